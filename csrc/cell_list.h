// Every cell: a struct of cells.h. Enums, switches and tables are made from this list.
#pragma once

#define FUSEDRNN_CELLS(X) X(Lstm) X(Gru) X(RnnTanh) X(RnnRelu)
