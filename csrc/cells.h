// Every cell's pointwise forward and backward, for host and device: structs that are printed from their definitions.
//
// T is float or double, or on the CPU a SIMD vector of them: sigmoid(T), tanh(T) and so on are found by overload.
// A cell has kGates gates (torch's order), kAccumulators pre-activation sums, kSaved arrays kept for backward, kStates
// states, of which the first is h, kParameters numbers of each unit and kInputs of each unit and step.
// Gate g of x W_ih^T goes into accumulator x_acc(g), gate g of h W_hh^T into h_acc(g); an accumulator that only
// h feeds starts from b_hh alone.
//
//   forward   acc[kAccumulators], prev[kStates], parameters, inputs -> next[kStates], saved[kSaved]
//   backward  d[kStates], the whole gradients of the new states; saved, next, prev, parameters, inputs
//             -> dacc, dprev[kStates], of which dprev[0] is only what reaches h past the product, dparameters, dinputs
//   output    h before a projection, from what was saved
//
// What the flags say is not used need not be there: next[0] without kUsesH, prev[0] without kUsesHPrev (in forward as
// well); without kDirectH dprev[0] is not written.
#pragma once

#include "printed.h"
