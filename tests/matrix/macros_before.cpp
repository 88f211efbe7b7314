// SPDX-License-Identifier: MIT
// What C, Windows, X11 and users name so before anything is included. (Standard headers have no
// such names: a complex.h that defines I, as in C, defines it as here.) With FILES, what reads and
// writes files; nlohmann_json, which that includes, has template arguments of name E.
#define I 7
#define min(a, b) ((a) < (b) ? (a) : (b))
#define max(a, b) ((a) > (b) ? (a) : (b))
#ifdef FILES
#include <local_mha/io/atomic_file.hpp>
#include <local_mha/io/attention_layers.hpp>
#include <local_mha/io/encoder_weights.hpp>
#include <local_mha/io/safetensors.hpp>
#include <local_mha/io/weights.hpp>
#else
#define E 2.718281828459045
#endif

#include <local_mha/attention/token_window.hpp>
#include <local_mha/autodiff.hpp>
#include <local_mha/extern.hpp>
#include <local_mha/local_mha.hpp>
#include <local_mha/longformer.hpp>

// They are the user's still. (g++'s library undefines min and max.)
static_assert(I == 7);
#ifndef FILES
static_assert(E > 2.7);
#endif

int main() { return local_mha::LocalMHAConfig{.dim = 1, .window_size = 1}.causal ? 1 : 0; }
