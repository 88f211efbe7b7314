// SPDX-License-Identifier: MIT
/// \file
/// State dicts of the Python modules: what reads and writes them, and what is in them.
#pragma once

#include <local_mha/io/rotary_buffers.hpp>
#include <local_mha/io/state_dict_layout.hpp>
#include <local_mha/io/state_dict_reader.hpp>
#include <local_mha/io/state_dict_writer.hpp>
#include <local_mha/io/tensor_names.hpp>
