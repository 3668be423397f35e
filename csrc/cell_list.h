// Every cell: a struct of cells.h and its gates. Enums, switches, tables and the names of kernels are made from this
// list.
#pragma once

#define FUSEDRNN_EACH_CELL(X, ...) \
  X(Lstm, 4, __VA_ARGS__) X(Gru, 3, __VA_ARGS__) X(RnnTanh, 1, __VA_ARGS__) X(RnnRelu, 1, __VA_ARGS__)

// A cell of one's own, by its number of gates.
#define FUSEDRNN_EACH_OWN_CELL(X, ...) \
  X(Own1, 1, __VA_ARGS__) X(Own2, 2, __VA_ARGS__) X(Own3, 3, __VA_ARGS__) X(Own4, 4, __VA_ARGS__)

// X(Cell) for each, and for those that are compiled ahead for the CPU alone.
#define FUSEDRNN_CELLS(X) FUSEDRNN_EACH_CELL(FUSEDRNN_WITHOUT_GATES, X) X(Slstm)
#define FUSEDRNN_WITHOUT_GATES(Cell, gates, X) X(Cell)
