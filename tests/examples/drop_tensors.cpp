// SPDX-License-Identifier: MIT
// drop_tensors IN OUT PREFIX: copies a case file of numbers without the tensors of that prefix.
#include <exception>
#include <iostream>
#include <string>

#include <local_mha/io/safetensors.hpp>

int main(int argc, char** argv) try {
  if (argc != 4) return 2;
  const local_mha::io::SafetensorsFile in(argv[1]);
  local_mha::io::SafetensorsWriter out;
  for (const std::string& name : in.names())
    if (!name.starts_with(argv[3])) out.add(name, in.entry(name).shape, in.read<double>(name));
  for (const auto& [key, value] : in.metadata()) out.set_metadata(key, value);
  out.write(argv[2]);
  return 0;
} catch (const std::exception& error) {
  std::cerr << error.what() << '\n';
  return 2;
}
