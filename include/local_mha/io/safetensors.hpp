// SPDX-License-Identifier: MIT
/// \file
/// Reading and writing safetensors files: named tensors and a map of text, no layer.
///
///     N, 8 bytes, little-endian │ header: N bytes of JSON │ the tensors' bytes, nothing between
///
///     {"__metadata__": {"key": "text", …},
///      "name": {"dtype": "F32", "shape": [2, 3], "data_offsets": [begin, end]}, …}
///
/// Tensors are row-major and little-endian; offsets count from the header's end.
/// https://huggingface.co/docs/safetensors
#pragma once

#include <local_mha/io/safetensors_reader.hpp>
#include <local_mha/io/safetensors_writer.hpp>
