// SPDX-License-Identifier: MIT
/// \file
/// The library's version. CMake reads it from here.
#pragma once

#define LOCAL_MHA_VERSION_MAJOR 0
#define LOCAL_MHA_VERSION_MINOR 2
#define LOCAL_MHA_VERSION_PATCH 0
