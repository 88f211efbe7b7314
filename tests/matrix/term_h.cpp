// SPDX-License-Identifier: MIT
// curses and terminfo, whose macros have names in lower case, before all else.
#if __has_include(<term.h>)
#include <curses.h>
#include <term.h>
#endif

#include <local_mha/local_mha.hpp>

int main() { return local_mha::LocalMHAConfig{.dim = 1, .window_size = 1}.causal ? 1 : 0; }
