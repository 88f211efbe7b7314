// SPDX-License-Identifier: MIT
// Any bytes as a safetensors file: read, converted, taken as weights, written and read again. What
// is wrong with them must come as a SafetensorsError and nothing else.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <optional>
#include <utility>
#include <vector>

#include <local_mha/io/weights.hpp>

#include "fuzz/fuzz_target.hpp"

namespace {

using namespace local_mha::io;

template <typename Use>
void use(const Use& attempt) {
  try {
    attempt();
  } catch (const SafetensorsError& error) {
    fuzz::require(std::strlen(error.what()) > 0, "an error says something");
  }
}

void read_everything(const SafetensorsFile& file) {
  for (const auto& [name, entry] : file.entries()) {
    const auto count = static_cast<std::size_t>(entry.size());
    if (entry.dtype != Dtype::Other)
      fuzz::require(8 * entry.bytes.size() == count * bits_of(entry.dtype), "sizes agree");
    use([&] { fuzz::require(file.read<double>(name).size() == count, "double"); });
    use([&] { fuzz::require(file.read<float>(name).size() == count, "float"); });
    use([&] { fuzz::require(file.read<std::int64_t>(name).size() == count, "int64"); });
    use([&] { fuzz::require(file.read<std::uint8_t>(name).size() == count, "uint8"); });
    use([&] { static_cast<void>(file.tensor<bool, 2>(name)); });
    use([&] { static_cast<void>(file.tensor<float, 3>(name)); });
    use([&] { static_cast<void>(file.scalar<double>(name)); });
  }
}

// What was read is what is written, and writing it again changes nothing.
void write_again(const SafetensorsFile& file) {
  SafetensorsWriter writer;
  for (const auto& [key, text] : file.metadata()) writer.set_metadata(key, text);
  for (const auto& [name, entry] : file.entries()) {
    if (entry.dtype == Dtype::Other) return;
    writer.add_bytes(name, entry.dtype, entry.shape, entry.bytes);
  }
  const SafetensorsFile again = SafetensorsFile::from_bytes(writer.bytes());
  fuzz::require(again.metadata() == file.metadata(), "the same metadata");
  fuzz::require(again.names() == file.names(), "the same names");
  for (const auto& [name, entry] : file.entries()) {
    const TensorEntry& other = again.entry(name);
    fuzz::require(other.dtype == entry.dtype && other.shape == entry.shape, "the same shape");
    fuzz::require(
        std::equal(other.bytes.begin(), other.bytes.end(), entry.bytes.begin(), entry.bytes.end()),
        "the same bytes");
  }
}

// Weights that were read can be written and read again, which need not be refused any more.
void load(const SafetensorsFile& file) {
  use([&] { static_cast<void>(read_case(file)); });
  use([&] { static_cast<void>(load_local_attention(file)); });
  std::optional<LocalMHAWeights<float>> layer;
  use([&] { layer = load_local_mha<float>(file); });
  if (layer) {
    SafetensorsWriter writer;
    add_local_mha(writer, layer->config, layer->parameters);
    static_cast<void>(load_local_mha<float>(SafetensorsFile::from_bytes(writer.bytes())));
  }
  std::optional<LocalTransformerWeights<double>> model;
  use([&] { model = load_local_transformer<double>(file); });
  if (model) {
    SafetensorsWriter writer;
    add_local_transformer(writer, model->config, model->parameters, {.prefix = ""});
    static_cast<void>(load_local_transformer<double>(SafetensorsFile::from_bytes(writer.bytes())));
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  std::vector<std::byte> bytes(size);
  if (size > 0) std::memcpy(bytes.data(), data, size);
  std::optional<SafetensorsFile> file;
  use([&] { file = SafetensorsFile::from_bytes(std::move(bytes)); });
  if (file) {
    read_everything(*file);
    write_again(*file);
    load(*file);
  }
  return 0;
}
