// What libfusedrnn.so offers to the other libraries of the package.
#pragma once

#define FUSEDRNN_API __attribute__((visibility("default")))
