// SPDX-License-Identifier: MIT
/// \file
/// Reading safetensors files. The format is described in safetensors.hpp.
#pragma once

#include <cstddef>
#include <filesystem>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include <local_mha/io/file_bytes.hpp>
#include <local_mha/io/safetensors_header.hpp>
#include <local_mha/io/safetensors_index.hpp>
#include <local_mha/io/tensor_source.hpp>

namespace local_mha::inline LOCAL_MHA_ABI::io {

/// A safetensors file, open for reading; or several files, by their index.
///
/// Opening touches the header alone, and each tensor is converted when it is read. Copies share
/// what is open. Replacing a file, as SafetensorsWriter does, is always fine; shortening one is not
/// while it is mapped, see FileAccess.
///
/// Everything is checked on opening: a malformed, overlapping, incomplete or truncated file throws,
/// and never makes it allocate more than a small multiple of its own size. A tensor of a dtype that
/// this library does not know is an error when it is read.
///
/// An index, `model.safetensors.index.json`, names the file of each tensor; it is opened as a file
/// is, and what the files beside it hold is then read as if it stood in one. Of a text of
/// `__metadata__` that several have, the first file's counts, in the order of their names.
class SafetensorsFile : public TensorSource {
 public:
  /// Opens a file and reads its header, or those of the files that an index names.
  /// \param path of a safetensors file, or of an index of several
  /// \param prefixes of an index: only files with tensors whose names begin with one of them are
  ///   opened, as for a layer of a large model; the others need not be there. None: all files
  /// \throws SafetensorsError with the tensor's name and the byte offset; naming the prefix if the
  ///   index has no such names
  explicit SafetensorsFile(const std::filesystem::path& path, FileAccess access = FileAccess::map,
                           const std::vector<std::string>& prefixes = {})
      : SafetensorsFile(open(path, access, prefixes)) {}

  /// A file that is in memory already.
  /// \param name stands for the path in errors
  /// \throws SafetensorsError with the tensor's name and the byte offset
  static SafetensorsFile from_bytes(std::vector<std::byte> bytes, std::string name = "bytes") {
    return SafetensorsFile(
        single(std::make_shared<const detail::FileBytes>(std::move(bytes), std::move(name))));
  }

  // No moves: a file that was moved from would be none.
  SafetensorsFile(const SafetensorsFile&) = default;
  SafetensorsFile& operator=(const SafetensorsFile&) = default;
  ~SafetensorsFile() = default;

 private:
  explicit SafetensorsFile(detail::TensorContent content)
      : TensorSource(std::make_shared<const detail::TensorContent>(std::move(content))) {}

  static detail::TensorContent single(std::shared_ptr<const detail::FileBytes> bytes) {
    detail::SafetensorsHeader header = detail::parse_header(bytes->name(), bytes->bytes());
    return {bytes->name(), {bytes}, std::move(header)};
  }

  static detail::TensorContent open(const std::filesystem::path& path, FileAccess access,
                                    const std::vector<std::string>& prefixes) {
    auto bytes = detail::FileBytes::open(path, access);
    return detail::is_json_object(detail::as_text(bytes->bytes()))
               ? detail::open_index(path, *bytes, access, prefixes)
               : single(std::move(bytes));
  }
};

}  // namespace local_mha::inline LOCAL_MHA_ABI::io
