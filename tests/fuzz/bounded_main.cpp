// SPDX-License-Identifier: MIT
// Runs a fuzz target without libFuzzer, for a bounded time and the same way every time: on every
// file of a corpus, and on mutations of each from a fixed seed.
//
//     fuzz_target CORPUS_FOLDER MUTATIONS_PER_FILE
//
// Each input is first written to the file that LOCAL_MHA_FUZZ_INPUT names, if that is set in the
// environment: after a crash, it is the one.
#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <exception>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <iterator>
#include <random>
#include <string>
#include <string_view>
#include <vector>

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size);

namespace {

using Input = std::vector<std::uint8_t>;
using Random = std::mt19937_64;

// Uniform enough, and the same on every standard library.
std::size_t below(Random& random, std::size_t limit) { return limit == 0 ? 0 : random() % limit; }

// What often stands at the border of what is allowed.
constexpr std::array<std::string_view, 24> tokens{"{",
                                                  "}",
                                                  "[",
                                                  "]",
                                                  ",",
                                                  ":",
                                                  "\"",
                                                  "null",
                                                  "true",
                                                  "-1",
                                                  "0",
                                                  "1e999",
                                                  "2.5",
                                                  "\\u0000",
                                                  "\xff",
                                                  "9223372036854775808",
                                                  "18446744073709551615",
                                                  "4294967296",
                                                  "\"F64\"",
                                                  "\"BOOL\"",
                                                  "\"shape\":",
                                                  "\"data_offsets\":",
                                                  "\"__metadata__\":",
                                                  "[[[[[[[["};

void mutate_once(Input& input, const Input& other, Random& random) {
  const auto at = [&] { return static_cast<std::ptrdiff_t>(below(random, input.size() + 1)); };
  const auto byte = [&]() -> std::uint8_t& { return input[below(random, input.size())]; };
  switch (input.empty() ? 3 : below(random, 9)) {
    case 0:
      byte() = static_cast<std::uint8_t>(random());
      break;
    case 1:
      byte() ^= static_cast<std::uint8_t>(1U << below(random, 8));
      break;
    case 2: {  // erase a range
      const auto first = at();
      const auto last =
          std::min<std::ptrdiff_t>(first + 1 + static_cast<std::ptrdiff_t>(below(random, 16)),
                                   static_cast<std::ptrdiff_t>(input.size()));
      input.erase(input.begin() + std::min(first, last), input.begin() + last);
      break;
    }
    case 3: {  // insert a token
      const std::string_view token = tokens[below(random, tokens.size())];
      input.insert(input.begin() + at(), token.begin(), token.end());
      break;
    }
    case 4: {  // overwrite with a token
      const std::string_view token = tokens[below(random, tokens.size())];
      const auto first = static_cast<std::size_t>(at());
      for (std::size_t i = 0; i < token.size() && first + i < input.size(); ++i)
        input[first + i] = static_cast<std::uint8_t>(token[i]);
      break;
    }
    case 5: {  // change a digit
      const auto first = input.begin() + at();
      const auto digit =
          std::find_if(first, input.end(), [](std::uint8_t c) { return c >= '0' && c <= '9'; });
      if (digit != input.end()) *digit = static_cast<std::uint8_t>('0' + below(random, 10));
      break;
    }
    case 6:  // cut
      input.resize(below(random, input.size() + 1));
      break;
    case 7: {  // repeat a range
      const auto first = at();
      const auto size = std::min<std::ptrdiff_t>(static_cast<std::ptrdiff_t>(below(random, 64)),
                                                 static_cast<std::ptrdiff_t>(input.size()) - first);
      const Input range(input.begin() + first, input.begin() + first + size);
      input.insert(input.begin() + at(), range.begin(), range.end());
      break;
    }
    default: {  // the end of another input
      const std::size_t from = below(random, other.size() + 1);
      input.resize(below(random, input.size() + 1));
      input.insert(input.end(), other.begin() + static_cast<std::ptrdiff_t>(from), other.end());
    }
  }
}

// A header that changed its size would only be cut off: half of the time the field follows it.
void mend_size_field(Input& input, std::size_t before) {
  if (input.size() < 8) return;
  std::uint64_t size = 0;
  for (std::size_t i = 0; i < 8; ++i) size |= static_cast<std::uint64_t>(input[i]) << (8 * i);
  if (size > before) return;  // a text, or damaged already
  size += input.size() - before;
  for (std::size_t i = 0; i < 8; ++i) input[i] = static_cast<std::uint8_t>(size >> (8 * i));
}

void run(const Input& input, const std::string& name) {
  static const char* const keep = std::getenv("LOCAL_MHA_FUZZ_INPUT");
  if (keep != nullptr)
    std::ofstream(keep, std::ios::binary)
        .write(reinterpret_cast<const char*>(input.data()),
               static_cast<std::streamsize>(input.size()));
  try {
    LLVMFuzzerTestOneInput(input.data(), input.size());
  } catch (const std::exception& error) {
    std::cerr << name << ": " << error.what() << '\n';
    std::exit(1);
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) {
    std::cerr << "usage: " << argv[0] << " CORPUS_FOLDER MUTATIONS_PER_FILE\n";
    return 2;
  }
  std::vector<std::filesystem::path> paths;
  for (const auto& entry : std::filesystem::directory_iterator(argv[1]))
    if (entry.is_regular_file()) paths.push_back(entry.path());
  std::sort(paths.begin(), paths.end());
  if (paths.empty()) {
    std::cerr << argv[1] << ": expected files, got none\n";
    return 1;
  }
  std::vector<Input> corpus;
  for (const auto& path : paths) {
    std::ifstream file(path, std::ios::binary);
    corpus.emplace_back(std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>());
  }
  const unsigned long mutations = std::stoul(argv[2]);
  for (std::size_t i = 0; i < corpus.size(); ++i) {
    const std::string name = paths[i].filename().string();
    run(corpus[i], name);
    for (unsigned long m = 0; m < mutations; ++m) {
      Random random(1000003 * i + m);
      Input input = corpus[i];
      for (std::size_t left = 1 + below(random, 4); left > 0; --left) {
        const std::size_t before = input.size();
        mutate_once(input, corpus[below(random, corpus.size())], random);
        if (below(random, 2) == 0) mend_size_field(input, before);
      }
      run(input, name + ", mutation " + std::to_string(m));
    }
  }
  std::cout << corpus.size() << " files, " << corpus.size() * (mutations + 1) << " inputs\n";
  return 0;
}
