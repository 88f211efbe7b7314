// SPDX-License-Identifier: MIT
// What C, Windows and X11 name so before anything is included. (Standard headers have no such
// names, but for complex.h, whose I Eigen undefines.)
#define E 2.718281828459045
#define min(a, b) ((a) < (b) ? (a) : (b))
#define max(a, b) ((a) > (b) ? (a) : (b))

#include <complex.h>

#include <local_mha/local_mha.hpp>

int main() { return local_mha::LocalMHAConfig{.dim = 1, .window_size = 1}.causal ? 1 : 0; }
