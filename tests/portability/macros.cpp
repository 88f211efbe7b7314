// SPDX-License-Identifier: MIT
// No name of ours is one that usual headers of systems define as a macro. The standard library,
// Eigen and nlohmann_json come before: how they bear such names is theirs to say.
#include <algorithm>
#include <array>
#include <atomic>
#include <bit>
#include <cerrno>
#include <cmath>
#include <complex>
#include <concepts>
#include <condition_variable>
#include <filesystem>
#include <fstream>
#include <functional>
#include <iomanip>
#include <iostream>
#include <limits>
#include <map>
#include <memory>
#include <mutex>
#include <numeric>
#include <optional>
#include <random>
#include <ranges>
#include <set>
#include <span>
#include <sstream>
#include <string>
#include <string_view>
#include <system_error>
#include <thread>
#include <type_traits>
#include <utility>
#include <variant>
#include <vector>

#include <Eigen/Core>
#include <nlohmann/json.hpp>
#include <unsupported/Eigen/AutoDiff>
#include <unsupported/Eigen/CXX11/Tensor>

#if __has_include(<unistd.h>)
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>
#endif
#if __has_include(<sys/mman.h>)
#include <sys/mman.h>
#endif
#if defined(__SSE2__)
#include <immintrin.h>
#endif

// What a name expands to is not C++ wherever it stands.
#define TAKEN )taken by a macro(

// complex.h
#undef I
#define I TAKEN
#define complex TAKEN
#define imaginary TAKEN
// windows.h and what it includes
#define min(a, b) TAKEN
#define max(a, b) TAKEN
#define small TAKEN
#define near TAKEN
#define far TAKEN
#define hyper TAKEN
#define interface TAKEN
#define pascal TAKEN
#define cdecl TAKEN
#define IN TAKEN
#define OUT TAKEN
#define OPTIONAL TAKEN
#define CONST TAKEN
#define VOID TAKEN
#define THIS TAKEN
#define ERROR TAKEN
#define DELETE TAKEN
#define IGNORE TAKEN
#define INFINITE TAKEN
#define RELATIVE TAKEN
#define ABSOLUTE TAKEN
#define STRICT TAKEN
#define Yield TAKEN
#define GetObject TAKEN
#define CreateFile TAKEN
#define DeleteFile TAKEN
#define MoveFile TAKEN
#define CopyFile TAKEN
#define GetMessage TAKEN
#define ReplaceText TAKEN
#define GetTempPath TAKEN
#undef TRUE
#undef FALSE
#define TRUE TAKEN
#define FALSE TAKEN
// X11
#define None TAKEN
#define Bool TAKEN
#define Status TAKEN
#define Success TAKEN
#define Always TAKEN
#define True TAKEN
#define False TAKEN
#define Above TAKEN
#define Below TAKEN
#define Complex TAKEN
#define Convex TAKEN
#define Unsorted TAKEN
#define Expose TAKEN
#define AllPlanes TAKEN
// sys/sysmacros.h, sys/param.h, termios.h, gnu++
#undef major
#undef minor
#undef makedev
#undef unix
#undef linux
#undef i386
#undef MIN
#undef MAX
#define major(device) TAKEN
#define minor(device) TAKEN
#define makedev(a, b) TAKEN
#define unix TAKEN
#define linux TAKEN
#define i386 TAKEN
#define sun TAKEN
#define MIN(a, b) TAKEN
#define MAX(a, b) TAKEN
#define roundup(a, b) TAKEN
#define howmany(a, b) TAKEN
#define isset(a, b) TAKEN
#define B0 TAKEN
#define B50 TAKEN
#define ECHO TAKEN
#define EMPTY TAKEN
// term.h
#define bell TAKEN
#define columns TAKEN
#define lines TAKEN
// ctype.h of newlib and of the BSDs
#define _N TAKEN
#define _L TAKEN
#define _U TAKEN
#define _S TAKEN
#define _P TAKEN
#define _C TAKEN
#define _X TAKEN
#define _B TAKEN
// AssertMacros.h, Objective-C
#define check(assertion) TAKEN
#define verify(assertion) TAKEN
#define require(assertion, label) TAKEN
#define nil TAKEN
#define YES TAKEN
#define NO TAKEN
// Arduino.h
#define F(literal) TAKEN
#define B1 TAKEN
#define B10 TAKEN
#define bit(b) TAKEN
#define sq(x) TAKEN
#define constrain(x, a, b) TAKEN
#define radians(x) TAKEN
#define INPUT TAKEN
#define OUTPUT TAKEN
#define HIGH TAKEN
#define LOW TAKEN
#define PI TAKEN
#define DEFAULT TAKEN
// Qt, GLib, gettext, cpprestsdk
#define slots TAKEN
#define signals TAKEN
#define emit TAKEN
#define foreach TAKEN
#define forever TAKEN
#define ABS(a) TAKEN
#define CLAMP(x, low, high) TAKEN
#define _(text) TAKEN
#define N_(text) TAKEN
#define U(text) TAKEN

#include "all_headers.hpp"
