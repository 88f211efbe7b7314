// SPDX-License-Identifier: MIT
// Files that are not as the format says: each an error with the tensor's name and the byte, without
// taking more memory than the file's own size accounts for.
#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <new>
#include <ostream>
#include <string>
#include <vector>

#include <local_mha/io/safetensors.hpp>

#include "io/file_builder.hpp"

namespace {
std::atomic<std::size_t> largest_allocation{0};
}  // namespace

// Replaced in this program, to see how much memory a reader asks for. Not inlined, or else g++ sees
// free() take what operator new gave.
[[gnu::noinline]] void* operator new(std::size_t size) {
  if (size > largest_allocation.load()) largest_allocation = size;
  if (void* memory = std::malloc(std::max<std::size_t>(size, 1))) return memory;
  throw std::bad_alloc();
}
[[gnu::noinline]] void operator delete(void* memory) noexcept { std::free(memory); }
[[gnu::noinline]] void operator delete(void* memory, std::size_t) noexcept { std::free(memory); }

namespace {

using namespace local_mha::io;
using namespace io_test;

constexpr std::uint64_t anywhere = ~std::uint64_t{0};

struct Malformed {
  std::string name;
  Bytes bytes;
  std::string message;              // a part of the error's text
  std::string tensor = {};          // SafetensorsError::tensor()
  std::uint64_t offset = anywhere;  // SafetensorsError::offset()
};

void PrintTo(const Malformed& malformed, std::ostream* out) { *out << malformed.name; }

// An entry for tensor 'x'.
std::string entry(const std::string& members) { return R"({"x":{)" + members + "}}"; }

// An entry of dtype F32 for tensor 'x' with this shape and these offsets.
std::string floats(const std::string& shape, const std::string& offsets) {
  return entry(R"("dtype":"F32","shape":)" + shape + R"(,"data_offsets":)" + offsets);
}

// Tensors 'a' and 'x' of bytes.
std::string two_tensors(const std::string& a_shape, const std::string& a_offsets,
                        const std::string& x_shape, const std::string& x_offsets) {
  return R"({"a":{"dtype":"U8","shape":)" + a_shape + R"(,"data_offsets":)" + a_offsets +
         R"(},"x":{"dtype":"U8","shape":)" + x_shape + R"(,"data_offsets":)" + x_offsets + "}}";
}

// A file of them: the error is at `at` in its data.
Malformed wrong_layout(const std::string& name, const std::string& header, std::size_t count,
                       const std::string& message, std::uint64_t at) {
  return {name, file_with_data(header, count), message, "x", 8 + header.size() + at};
}

// What is no safetensors file at all.
Malformed other_kind(const std::string& name, const std::string& content, const std::string& kind) {
  return {name, to_bytes(content), "expected a safetensors file, got what seems to be " + kind, "",
          0};
}

std::string tar() {
  std::string archive(512, '\0');
  archive.replace(0, 17, "model.safetensors").replace(257, 5, "ustar");
  return archive;
}

std::string repeated(const std::string& text, std::size_t times) {
  std::string all;
  all.reserve(text.size() * times);
  for (std::size_t i = 0; i < times; ++i) all += text;
  return all;
}

const std::string two_numbers = "shape: expected integers from 0 to 2^63 - 1";
const std::string two_offsets = "data_offsets: expected integers from 0 to 2^64 - 1";

std::vector<Malformed> files() {
  const std::string good = floats("[2]", "[0,8]");
  return {
      // The size of the header.
      {"Empty", {}, "seems to be an empty file", "", 0},
      {"SizeCutShort", to_bytes("\x40\1\1\1\1\1\1"),
       "expected 8 bytes with the header's size, got 7", "", 7},
      {"NoHeader", to_bytes(size_field(2)), "expected 2 bytes of header, got 0", "", 8},
      {"HeaderCutShort", to_bytes(size_field(good.size()) + good.substr(0, 20)),
       "bytes of header, got 20", "", 28},
      {"HeaderOf2To60", to_bytes(size_field(std::uint64_t{1} << 60) + "{}"),
       "expected at most 100000000 bytes, got 1152921504606846976", "", 0},
      {"HeaderOf2To64", to_bytes(size_field(~std::uint64_t{0}) + "{}"),
       "expected at most 100000000 bytes, got 18446744073709551615", "", 0},
      {"HeaderOfMinus8", to_bytes(size_field(~std::uint64_t{7}) + "{}"), "at most 100000000", "",
       0},
      {"HeaderOf100MegabytesAndOne", to_bytes(size_field(100'000'001) + "{}"),
       "expected at most 100000000 bytes, got 100000001", "", 0},
      {"HeaderOf100Megabytes", to_bytes(size_field(100'000'000) + "{}"),
       "expected 100000000 bytes of header, got 2", "", 10},
      {"UnknownKind", to_bytes("\x08\x07\x12\x07pytorch:"), "got one that begins with '", "", 0},
      {"UnknownKindOf8Bytes", to_bytes("\xff\x01\x02\x03\x04\x05\x06\x07"),
       "got one that begins with '", "", 0},
      {"HeaderOfNothing", file("", "\1"), "begin with '{'", "", 8},

      // Other files.
      other_kind("GitLfsPointer",
                 "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
                 "a Git LFS pointer"),
      other_kind("HtmlPage", "<!DOCTYPE html>\n<html><head>", "an HTML page"),
      other_kind("HtmlPageUpperCase", "\n\n  <HTML lang=\"en\">", "an HTML page"),
      other_kind("XmlError", "<?xml version=\"1.0\"?><Error>", "XML"),
      other_kind("Zip", std::string("PK\3\4\0\0\x08\x08\0\0", 10) + "archive/data.pkl",
                 "a zip archive"),
      other_kind("ZipOfNoFlags", std::string("PK\3\4\0\0\0\0\0\0", 10) + "archive/data.pkl",
                 "a zip archive"),
      other_kind("Pickle", "\x80\x02\x8a\x0al\xfc\x9c\x46\xf9 j\xa8P\x19.", "a Python pickle"),
      other_kind("PickleOfProtocol4", std::string("\x80\x04\x95\x1a\0\0\0\0\0\0\0}", 12),
                 "a Python pickle"),
      other_kind("Gzip", std::string("\x1f\x8b\x08\0\0\0\0\0\0\3", 10),
                 "a file compressed by gzip"),
      other_kind("Xz", std::string("\xfd\x37zXZ\0\0\4", 8), "a file compressed by xz"),
      other_kind("Zstd", std::string("\x28\xb5\x2f\xfd\x24\1\1\0", 8), "a file compressed by zstd"),
      other_kind("Gguf", std::string("GGUF\3\0\0\0\1\0\0\0", 12), "a GGUF file"),
      other_kind("Hdf5", std::string("\x89HDF\r\n\x1a\n\0\0", 10), "an HDF5 file"),
      other_kind("Numpy", std::string("\x93NUMPY\1\0v\0", 10), "a NumPy array"),
      other_kind("Tar", tar(), "a tar archive"),
      other_kind("Json", R"({"architectures": ["LocalTransformer"]})", "JSON"),
      other_kind("JsonOfTwoBytes", "{}", "JSON"),
      other_kind("JsonArray", "[1, 2, 3]", "JSON"),
      other_kind("Text", "Entry not found", "a text that begins with 'Entry not found'"),
      other_kind("TextOfAWord", "Oops\n", "a text that begins with 'Oops'"),
      other_kind("Utf16", std::string("\xff\xfe{\0\"\0a\0\"\0", 10), "a text in UTF-16"),
      other_kind("Zeros", std::string(100, '\0'), "nothing but zeros"),

      // The header's JSON.
      {"SpaceFirst", file(" {}"), "begin with '{'", "", 8},
      {"ByteOrderMark", file("\xef\xbb\xbf{}"), "begin with '{'", "", 8},
      {"Array", file("[]"), "begin with '{'", "", 8},
      {"Number", file("12"), "begin with '{'", "", 8},
      {"Unclosed", file("{"), "header: ", "", 9},
      {"UnclosedEntry", file(R"({"x":{"dtype":"F32")"), "header: ", "x", 27},
      {"UnclosedString", file(R"({"x)"), "header: ", "", 11},
      {"SecondValue", file("{}{}"), "header: ", "", 11},
      {"Garbage", file("{}garbage"), "header: ", "", 11},
      {"NullByteBehind", file(std::string("{}\0\0", 4)), "a null byte", "", 10},
      {"NullByteInAString", file(std::string("{\"\0\":1}", 7)), "a null byte", "", 10},
      {"Comment", file("{/**/}"), "header: ", "", 10},
      {"TrailingComma", file(R"({"__metadata__":{},})"), "header: ", "", anywhere},
      {"SingleQuotes", file("{'x':1}"), "header: ", "", 10},
      {"NotUtf8", file("{\"a\xff\":1}"), "header: ", "", 12},
      {"OverlongUtf8", file("{\"\xc0\x80\":1}"), "header: ", "", 11},
      {"SurrogateInUtf8", file("{\"\xed\xa0\x80\":1}"), "header: ", "", anywhere},
      {"Utf8CutShort", file("{\"\xe2\x82\":1}"), "header: ", "", anywhere},
      {"LoneSurrogateEscape", file(R"({"\ud800":1})"), "header: ", "", anywhere},
      {"ControlCharacter", file("{\"a\nb\":1}"), "header: ", "", anywhere},
      {"Infinity", file(floats("[Infinity]", "[0,8]")), "header: ", "x", anywhere},
      {"NumberTooLargeForADouble", file(floats("[1e999]", "[0,8]")), "header: ", "x", anywhere},

      // Nesting.
      {"DeepArrays", file(R"({"x":)" + repeated("[", 100'000)), "expected an object, got an array",
       "x", 14},
      {"DeepObjects", file(repeated(R"({"a":)", 100'000)),
       "expected dtype, shape and data_offsets, got 'a'", "a", anywhere},
      {"DeepShape", file(entry(R"("shape":)" + repeated("[", 100'000))),
       two_numbers + ", got an array", "x", anywhere},
      {"DeepOffsets", file(entry(R"("data_offsets":[)" + repeated("{\"\":", 100'000))),
       two_offsets + ", got an object", "x", anywhere},
      {"DeepDtype", file(entry(R"("dtype":)" + repeated("[", 100'000))),
       "dtype: expected a string, got an array", "x", anywhere},
      {"DeepMetadata", file(R"({"__metadata__":{"k":)" + repeated("[", 100'000)),
       "expected a string for 'k', got an array", "", anywhere},

      // Metadata.
      {"MetadataString", file(R"({"__metadata__":"text"})"),
       "__metadata__: expected an object, got a string", "", 30},
      {"MetadataNull", file(R"({"__metadata__":null})"),
       "__metadata__: expected an object, got null", "", anywhere},
      {"MetadataNumber", file(R"({"__metadata__":{"k":1}})"), "expected a string for 'k', got 1"},
      {"MetadataObject", file(R"({"__metadata__":{"k":{}}})"),
       "expected a string for 'k', got an object"},
      {"MetadataTrue", file(R"({"__metadata__":{"k":true}})"),
       "expected a string for 'k', got true"},
      {"MetadataNullText", file(R"({"__metadata__":{"k":null}})"),
       "expected a string for 'k', got null"},
      {"MetadataTwice", file(R"({"__metadata__":{},"__metadata__":{}})"), "stands there twice"},
      {"MetadataKeyTwice", file(R"({"__metadata__":{"k":"a","k":"b"}})"), "'k' stands there twice"},

      // Entries.
      {"EntryNumber", file(R"({"x":1})"), "expected an object, got 1", "x"},
      {"EntryString", file(R"({"x":"F32"})"), "expected an object, got a string", "x"},
      {"EntryNull", file(R"({"x":null})"), "expected an object, got null", "x"},
      {"EntryEmpty", file(R"({"x":{}})"), "dtype is missing", "x"},
      {"DtypeMissing", file_with_data(entry(R"("shape":[2],"data_offsets":[0,8])"), 8),
       "dtype is missing", "x"},
      {"ShapeMissing", file_with_data(entry(R"("dtype":"F32","data_offsets":[0,8])"), 8),
       "shape is missing", "x"},
      {"OffsetsMissing", file_with_data(entry(R"("dtype":"F32","shape":[2])"), 8),
       "data_offsets is missing", "x"},
      {"UnknownMember", file(entry(R"("dtype":"F32","stride":[1])")),
       "expected dtype, shape and data_offsets, got 'stride'", "x"},
      {"NameTwice",
       file_with_data(R"({"x":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},)"
                      R"("x":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}})",
                      8),
       "expected distinct names, got this one twice", "x"},
      {"NameTwiceEscaped",
       file_with_data(R"({"x":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},)"
                      R"("\u0078":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}})",
                      8),
       "expected distinct names, got this one twice", "x"},
      {"DtypeTwice", file(entry(R"("dtype":"F32","dtype":"F32")")), "dtype stands there twice",
       "x"},
      {"ShapeTwice", file(entry(R"("shape":[],"shape":[])")), "shape stands there twice", "x"},
      {"OffsetsTwice", file(entry(R"("data_offsets":[0,0],"data_offsets":[0,0])")),
       "data_offsets stands there twice", "x"},

      // Dtype.
      {"DtypeUnknown", file(entry(R"("dtype":"F33","shape":[2],"data_offsets":[1,0])")),
       "expected begin <= end", "x"},
      {"DtypeUnknownTooLarge",
       file(entry(R"("dtype":"F33","shape":[4294967296,4294967296],"data_offsets":[0,0])")),
       "fewer than 2^63 bytes, got 'F33' [4294967296, 4294967296]", "x"},
      {"DtypeOfHalfBytes",
       file_with_data(entry(R"("dtype":"F4","shape":[3],"data_offsets":[0,2])"), 2),
       "shape: expected whole bytes, fewer than 2^63, got F4 [3]", "x"},
      {"DtypeOfSixBits",
       file_with_data(entry(R"("dtype":"F6_E2M3","shape":[2],"data_offsets":[0,2])"), 2),
       "shape: expected whole bytes, fewer than 2^63, got F6_E2M3 [2]", "x"},
      {"DtypeOfSixBitsTooLong",
       file_with_data(entry(R"("dtype":"F6_E2M3","shape":[8],"data_offsets":[0,8])"), 8),
       "expected 6 bytes for F6_E2M3 [8], got 8", "x"},
      {"DtypeComplex",
       file_with_data(entry(R"("dtype":"C64","shape":[2],"data_offsets":[0,8])"), 8),
       "expected 16 bytes for C64 [2], got 8", "x"},
      {"DtypeNumber", file(entry(R"("dtype":32)")), "dtype: expected a string, got 32", "x"},
      {"DtypeNull", file(entry(R"("dtype":null)")), "dtype: expected a string, got null", "x"},

      // Shape.
      {"ShapeNumber", file(floats("2", "[0,8]")), "shape: expected an array, got 2", "x"},
      {"ShapeString", file(floats("\"[2]\"", "[0,8]")), "shape: expected an array", "x"},
      {"ShapeNegative", file(floats("[-2]", "[0,8]")), two_numbers + ", got a negative number",
       "x"},
      {"ShapeFraction", file(floats("[2.5]", "[0,8]")), two_numbers + ", got 2.5", "x"},
      {"ShapeFloat", file(floats("[2.0]", "[0,8]")), two_numbers + ", got 2.0", "x"},
      {"ShapeExponent", file(floats("[2e0]", "[0,8]")), two_numbers + ", got 2e0", "x"},
      {"ShapeText", file(floats("[\"2\"]", "[0,8]")), two_numbers + ", got a string", "x"},
      {"ShapeTrue", file(floats("[true]", "[0,4]")), two_numbers + ", got true", "x"},
      {"ShapeNull", file(floats("[null]", "[0,0]")), two_numbers + ", got null", "x"},
      {"ShapeOf2To63", file(floats("[9223372036854775808]", "[0,8]")),
       two_numbers + ", got 9223372036854775808", "x"},
      {"ShapeOf2To64", file(floats("[18446744073709551616]", "[0,8]")), two_numbers, "x"},
      {"ShapeOf65Dimensions", file(floats("[1" + repeated(",1", 64) + "]", "[0,4]")),
       "at most 64 dimensions", "x"},
      {"ShapeProductOverflows", file(floats("[4294967296,4294967296]", "[0,0]")),
       "fewer than 2^63 bytes, got F32 [4294967296, 4294967296]", "x", 8 + 4},
      {"ShapeProductOverflowsToItsSize",
       file_with_data(floats("[2305843009213693953,8]", "[0,32]"), 32), "fewer than 2^63 bytes",
       "x"},
      {"ShapeTimesElementOverflows", file(floats("[4611686018427387904]", "[0,0]")),
       "fewer than 2^63 bytes", "x"},
      {"ShapeProductOverflowsBesideAZero", file(floats("[0,4294967296,4294967296]", "[0,0]")),
       "fewer than 2^63 bytes", "x"},

      // Offsets.
      {"OffsetsNumber", file(floats("[2]", "0")), "data_offsets: expected an array, got 0", "x"},
      {"OffsetsEmpty", file(floats("[2]", "[]")), "data_offsets: expected two numbers, got 0", "x"},
      {"OffsetsOne", file(floats("[2]", "[0]")), "data_offsets: expected two numbers, got 1", "x"},
      {"OffsetsThree", file(floats("[2]", "[0,8,8]")),
       "data_offsets: expected two numbers, got more", "x"},
      {"OffsetsNegative", file(floats("[2]", "[-8,0]")), two_offsets + ", got a negative number",
       "x"},
      {"OffsetsMinusZero", file_with_data(floats("[2]", "[-0,8]"), 8),
       two_offsets + ", got a negative number", "x"},
      {"OffsetsFloat", file(floats("[2]", "[0.0,8.0]")), two_offsets + ", got 0.0", "x"},
      {"OffsetsOf2To64", file(floats("[2]", "[0,18446744073709551616]")), two_offsets, "x"},
      {"OffsetsText", file(floats("[2]", "[\"0\",\"8\"]")), two_offsets + ", got a string", "x"},
      {"OffsetsBackwards", file_with_data(floats("[2]", "[8,0]"), 8),
       "expected begin <= end, got [8, 0]", "x", 8 + 4},
      {"OffsetsTooShort", file_with_data(floats("[2]", "[0,4]"), 4),
       "expected 8 bytes for F32 [2], got 4", "x", 8 + 4},
      {"OffsetsTooLong", file_with_data(floats("[2]", "[0,12]"), 12),
       "expected 8 bytes for F32 [2], got 12", "x"},
      {"OffsetsForAnotherDtype",
       file_with_data(entry(R"("dtype":"F16","shape":[2],"data_offsets":[0,8])"), 8),
       "expected 4 bytes for F16 [2], got 8", "x"},
      {"OffsetsOfAnEmptyTensor", file_with_data(floats("[0]", "[0,4]"), 4),
       "expected 0 bytes for F32 [0], got 4", "x"},
      {"OffsetsWrapAround", file_with_data(floats("[2]", "[18446744073709551608,0]"), 8),
       "expected begin <= end", "x"},

      // The data.
      {"DataCutShort", file_with_data(good, 7),
       "truncated: expected its data at [0, 8) behind the header, got 7 bytes there", "x",
       8 + good.size() + 7},
      {"DataMissing", file(good), "truncated", "x", 8 + good.size()},
      {"DataOf2To62", file_with_data(floats("[1152921504606846976]", "[0,4611686018427387904]"), 8),
       "truncated", "x"},
      {"DataBehindTheEnd", file_with_data(floats("[0]", "[8,8]"), 4), "truncated", "x"},
      {"DataFarBehindTheEnd", file(floats("[0]", "[18446744073709551615,18446744073709551615]")),
       "truncated", "x"},
      {"BytesBehind", file_with_data(good, 9), "got 1 more bytes", "", 8 + good.size() + 8},
      {"BytesWithoutTensors", file_with_data("{}", 3), "got 3 more bytes", "", 10},
      {"GapAtTheBeginning", file_with_data(floats("[2]", "[4,12]"), 12),
       "expected to begin at 0, got 4", "x", 8 + floats("[2]", "[4,12]").size()},
      wrong_layout("GapBetween", two_tensors("[2]", "[0,2]", "[2]", "[3,5]"), 5,
                   "expected to begin at 2, got 3", 2),
      wrong_layout("Overlap", two_tensors("[4]", "[0,4]", "[4]", "[2,6]"), 6, "overlaps 'a'", 2),
      wrong_layout("SameBytes", two_tensors("[4]", "[0,4]", "[4]", "[0,4]"), 4, "overlaps 'a'", 0),
      wrong_layout("Within", two_tensors("[4]", "[0,4]", "[2]", "[1,3]"), 4, "overlaps 'a'", 1),
      wrong_layout("EmptyTensorWithin", two_tensors("[4]", "[0,4]", "[0]", "[2,2]"), 4,
                   "overlaps 'a'", 2),
  };
}

class MalformedFile : public testing::TestWithParam<Malformed> {};

TEST_P(MalformedFile, IsAnErrorWithTensorAndOffset) {
  const Malformed& malformed = GetParam();
  try {
    SafetensorsFile::from_bytes(malformed.bytes, "model.safetensors");
    FAIL() << "no exception";
  } catch (const SafetensorsError& error) {
    EXPECT_NE(std::string(error.what()).find(malformed.message), std::string::npos) << error.what();
    EXPECT_EQ(error.tensor(), malformed.tensor) << error.what();
    if (malformed.offset != anywhere) {
      EXPECT_EQ(error.offset(), malformed.offset) << error.what();
    }
    EXPECT_LE(error.offset(), malformed.bytes.size());
    EXPECT_TRUE(std::string(error.what()).starts_with("model.safetensors: ")) << error.what();
    EXPECT_LT(std::string(error.what()).size(), 800U);
  }
}

TEST_P(MalformedFile, IsTheSameErrorWhenMapped) {
  const Malformed& malformed = GetParam();
  const TemporaryFolder folder;
  const auto path = folder / "file";
  write_file(path, malformed.bytes);
  const auto message = message_of<SafetensorsError>([&] { SafetensorsFile{path}; });
  const bool is_object = malformed.name == "Json" || malformed.name == "JsonOfTwoBytes";
  const std::string expected =
      is_object ? "index of several with the key 'weight_map'" : malformed.message;
  EXPECT_NE(message.find(expected), std::string::npos) << message;
}

TEST_P(MalformedFile, TakesNoMoreMemoryThanItsSizeAccountsFor) {
  Bytes bytes = GetParam().bytes;
  const std::size_t size = bytes.size();
  largest_allocation = 0;
  EXPECT_THROW(SafetensorsFile::from_bytes(std::move(bytes)), SafetensorsError);
  EXPECT_LE(largest_allocation, 4 * size + 4096);
}

INSTANTIATE_TEST_SUITE_P(, MalformedFile, testing::ValuesIn(files()),
                         [](const auto& test) { return test.param.name; });

// A small file with most of what the format has.
Bytes sound_file() {
  return file(R"({"__metadata__":{"k":"v\u00e9"},)"
              R"("b":{"dtype":"F16","shape":[3],"data_offsets":[9,15]},)"
              R"("a":{"dtype":"F32","shape":[1,2],"data_offsets":[0,8]},)"
              R"("c":{"dtype":"BOOL","shape":[],"data_offsets":[8,9]},)"
              R"("empty":{"dtype":"I64","shape":[0,7],"data_offsets":[9,9]}}  )",
              std::string("\0\0\x80\x3f\0\0\0\x40\1\0\x3c\0\x40\0\x42", 15));
}

TEST(CutFile, IsAnErrorAtEveryLength) {
  const Bytes sound = sound_file();
  EXPECT_EQ(SafetensorsFile::from_bytes(sound).names().size(), 4U);
  for (std::size_t size = 0; size < sound.size(); ++size) {
    const Bytes cut(sound.begin(), sound.begin() + static_cast<std::ptrdiff_t>(size));
    EXPECT_THROW(SafetensorsFile::from_bytes(cut), SafetensorsError) << size;
  }
}

// Each value of a byte; under AddressSanitizer, which takes five times as long, every fifth, and
// others at the next place.
#if defined(__SANITIZE_ADDRESS__)
constexpr int value_step = 5;
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
constexpr int value_step = 5;
#else
constexpr int value_step = 1;
#endif
#else
constexpr int value_step = 1;
#endif
int first_value(std::size_t at) { return static_cast<int>(at % std::size_t{value_step}); }

TEST(DamagedFile, IsReadOrAnErrorForEveryValueOfEveryByte) {
  const Bytes sound = sound_file();
  std::size_t errors = 0;
  for (std::size_t at = 0; at < sound.size(); ++at)
    for (int value = first_value(at); value < 256; value += value_step) {
      Bytes damaged = sound;
      damaged[at] = static_cast<std::byte>(value);
      try {
        const auto file = SafetensorsFile::from_bytes(std::move(damaged));
        for (const auto& [name, entry] : file.entries()) {
          if (entry.dtype != Dtype::Other) {
            EXPECT_EQ(8 * entry.bytes.size(),
                      static_cast<std::size_t>(entry.size()) * bits_of(entry.dtype));
          }
          if (is_float(entry.dtype)) {
            EXPECT_EQ(file.read<double>(name).size(), static_cast<std::size_t>(entry.size()));
          }
        }
      } catch (const SafetensorsError&) {
        ++errors;
      }
    }
  EXPECT_GT(errors, sound.size() * 100 / std::size_t{value_step});
}

// ---- Indices of several files ----

class MalformedIndex : public testing::Test {
 protected:
  MalformedIndex() { write_file(folder_ / "1", sound_file()); }

  /// Opens it, all of it and a part; what the index says is then there.
  void open(const std::string& text) const {
    write_file(folder_ / "index", to_bytes(text));
    SafetensorsFile(folder_ / "index", FileAccess::read, {"a"});
    const SafetensorsFile file(folder_ / "index", FileAccess::read);
    for (const auto& [name, entry] : file.entries())
      if (is_float(entry.dtype)) {
        EXPECT_EQ(file.read<double>(name).size(), static_cast<std::size_t>(entry.size()));
      }
  }

  TemporaryFolder folder_;
  const std::string sound_ = R"({"metadata":{"k":"v"},"weight_map":{"a":"1","b":"1"}})";
};

TEST_F(MalformedIndex, IsAnErrorCutAtAnyLength) {
  EXPECT_NO_THROW(open(sound_));
  for (std::size_t size = 0; size < sound_.size(); ++size)
    EXPECT_THROW(open(sound_.substr(0, size)), SafetensorsError) << size;
}

TEST_F(MalformedIndex, IsReadOrAnErrorForEveryValueOfEveryByte) {
  std::size_t errors = 0;
  for (std::size_t at = 0; at < sound_.size(); ++at)
    for (int value = first_value(at); value < 256; value += value_step) {
      std::string damaged = sound_;
      damaged[at] = static_cast<char>(value);
      try {
        open(damaged);
      } catch (const SafetensorsError&) {
        ++errors;
      }
    }
  EXPECT_GT(errors, sound_.size() * 100 / std::size_t{value_step});
}

}  // namespace
