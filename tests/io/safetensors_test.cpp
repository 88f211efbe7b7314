// SPDX-License-Identifier: MIT
// Reading and writing of sound safetensors files.
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include <nlohmann/json.hpp>

#include <local_mha/io/safetensors.hpp>

#include "io/file_builder.hpp"

#ifndef _WIN32
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include "io/without_root.hpp"
#endif

namespace safetensors_test {

using namespace local_mha::io;
using namespace io_test;
using local_mha::Index;
using local_mha::RowMatrix;
using local_mha::Tensor;
using local_mha::TensorView;
using local_mha::Vector;

template <typename Scalar>
std::vector<Scalar> limits() {
  using Limits = std::numeric_limits<Scalar>;
  return {Limits::lowest(), Scalar{0}, Scalar{1}, Limits::max()};
}

template <typename Scalar>
void add(SafetensorsWriter& writer, const std::string& name, const std::vector<Scalar>& values) {
  writer.add(name, {static_cast<Index>(values.size())}, values);
}

SafetensorsFile reread(const SafetensorsWriter& writer) {
  return SafetensorsFile::from_bytes(writer.bytes());
}

// ---- What is read ----

TEST(SafetensorsFile, KnowsNamesShapesAndMetadata) {
  const auto read =
      SafetensorsFile::from_bytes(file(R"({"__metadata__":{"a":"1","format":"pt"},)"
                                       R"("y":{"dtype":"I8","shape":[2,0,3],"data_offsets":[4,4]},)"
                                       R"("x":{"data_offsets":[0,4],"shape":[],"dtype":"F32"}} )",
                                       std::string("\0\0\x80\x3f", 4)));
  EXPECT_EQ(read.names(), (std::vector<std::string>{"x", "y"}));
  EXPECT_EQ(read.metadata(), (std::map<std::string, std::string>{{"a", "1"}, {"format", "pt"}}));
  EXPECT_TRUE(read.contains("x"));
  EXPECT_FALSE(read.contains("__metadata__"));
  EXPECT_EQ(to_string(read.entry("y")), "I8 [2, 0, 3]");
  EXPECT_EQ(to_string(read.entry("x")), "F32 []");
  EXPECT_EQ(read.entry("x").size(), 1);
  EXPECT_EQ(read.entry("y").size(), 0);
  EXPECT_EQ(read.read<float>("x"), std::vector<float>{1});
  EXPECT_EQ(read.scalar<double>("x"), 1);
  EXPECT_EQ((read.tensor<float, 0>("x")()), 1);
  EXPECT_TRUE(read.read<std::int64_t>("y").empty());
}

TEST(SafetensorsFile, MayHoldNothing) {
  EXPECT_TRUE(SafetensorsFile::from_bytes(file("{}")).names().empty());
  EXPECT_TRUE(SafetensorsFile::from_bytes(file("{}      \n\t ")).names().empty());
  EXPECT_TRUE(SafetensorsFile::from_bytes(file(R"({"__metadata__":{}})")).names().empty());
}

TEST(SafetensorsFile, TakesAnyNameAndAnyOrderOfData) {
  const auto read = SafetensorsFile::from_bytes(
      file(R"({"":{"dtype":"U8","shape":[1],"data_offsets":[2,3]},)"
           R"("\u00e9\"\n":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},)"
           R"("a/b c":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}})",
           "\1\2\3"));
  EXPECT_EQ(read.read<std::uint8_t>("")[0], 3);
  EXPECT_EQ(read.read<std::uint8_t>("\xc3\xa9\"\n")[0], 1);
  EXPECT_EQ(read.read<std::uint8_t>("a/b c")[0], 2);
}

TEST(SafetensorsFile, ReadsTensorsAtAnyAlignment) {
  const std::vector<double> values{1.5, -2.25, 1e300, 0};
  for (std::size_t shift = 0; shift < 8; ++shift) {
    std::string data(shift, 'x');
    for (const double value : values) data += size_field(std::bit_cast<std::uint64_t>(value));
    const std::string begin = std::to_string(shift);
    const std::string end = std::to_string(data.size());
    const auto read = SafetensorsFile::from_bytes(file(
        R"({"pad":{"dtype":"U8","shape":[)" + begin + R"(],"data_offsets":[0,)" + begin +
            R"(]},"x":{"dtype":"F64","shape":[2,2],"data_offsets":[)" + begin + "," + end + "]}}",
        data));
    EXPECT_EQ(read.read<double>("x"), values);
    EXPECT_EQ(read.read<float>("x")[1], -2.25F);
  }
}

TEST(SafetensorsFile, ConvertsIntegersToInt64) {
  SafetensorsWriter writer;
  add(writer, "I8", limits<std::int8_t>());
  add(writer, "I16", limits<std::int16_t>());
  add(writer, "I32", limits<std::int32_t>());
  add(writer, "I64", limits<std::int64_t>());
  add(writer, "U8", limits<std::uint8_t>());
  add(writer, "U16", limits<std::uint16_t>());
  add(writer, "U32", limits<std::uint32_t>());
  add(writer, "U64",
      std::vector<std::uint64_t>{0, 1, std::uint64_t{1} << 62, (~std::uint64_t{0}) >> 1});
  const auto read = reread(writer);
  const auto expect = [&](const char* name, std::int64_t lowest, std::int64_t largest) {
    EXPECT_EQ(name_of(read.entry(name).dtype), name);
    const auto values = read.read<std::int64_t>(name);
    EXPECT_EQ(values.front(), lowest) << name;
    EXPECT_EQ(values.back(), largest) << name;
  };
  expect("I8", -128, 127);
  expect("I16", -32768, 32767);
  expect("I32", -2147483648LL, 2147483647);
  expect("I64", std::numeric_limits<std::int64_t>::min(), std::numeric_limits<std::int64_t>::max());
  expect("U8", 0, 255);
  expect("U16", 0, 65535);
  expect("U32", 0, 4294967295LL);
  expect("U64", 0, std::numeric_limits<std::int64_t>::max());
  EXPECT_EQ(read.read<std::uint8_t>("U8"), limits<std::uint8_t>());
}

TEST(SafetensorsFile, ConvertsFloatsExactly) {
  const auto read = SafetensorsFile::from_bytes(
      file(R"({"F16":{"dtype":"F16","shape":[6],"data_offsets":[0,12]},)"
           R"("BF16":{"dtype":"BF16","shape":[3],"data_offsets":[12,18]}})",
           std::string("\x01\x00"   // 2^-24, the smallest subnormal
                       "\xff\x03"   // 1023 · 2^-24, the largest
                       "\x00\xfc"   // -infinity
                       "\x01\x7e"   // NaN
                       "\x00\x80"   // -0
                       "\xff\x7b"   // 65504
                       "\x01\x00"   // 2^-133, the smallest subnormal
                       "\x80\x7f"   // infinity
                       "\xc0\xbf",  // -1.5
                       18)));
  for (const auto& half : {read.read<double>("F16"), [&] {
                             const auto f = read.read<float>("F16");
                             return std::vector<double>(f.begin(), f.end());
                           }()}) {
    EXPECT_EQ(half[0], 0x1p-24);
    EXPECT_EQ(half[1], 1023 * 0x1p-24);
    EXPECT_EQ(half[2], -std::numeric_limits<double>::infinity());
    EXPECT_TRUE(std::isnan(half[3]));
    EXPECT_TRUE(half[4] == 0 && std::signbit(half[4]));
    EXPECT_EQ(half[5], 65504);
  }
  EXPECT_EQ(read.read<float>("BF16"),
            (std::vector<float>{0x1p-133F, std::numeric_limits<float>::infinity(), -1.5F}));
}

TEST(SafetensorsFile, ReadsSixteenBitsAsTheyAre) {
  // 1, a NaN that signals, with a payload, infinity.
  const auto read = SafetensorsFile::from_bytes(
      file(R"({"F16":{"dtype":"F16","shape":[3],"data_offsets":[0,6]},)"
           R"("BF16":{"dtype":"BF16","shape":[3],"data_offsets":[6,12]}})",
           std::string("\x00\x3c\x05\xfc\x00\x7c\x80\x3f\x85\xff\x80\x7f", 12)));
  const auto bits = [](const auto& numbers) {
    std::vector<int> of;
    for (const auto& number : numbers) of.push_back(Eigen::numext::bit_cast<std::uint16_t>(number));
    return of;
  };
  EXPECT_EQ(bits(read.read<Eigen::half>("F16")), (std::vector<int>{0x3c00, 0xfc05, 0x7c00}));
  EXPECT_EQ(bits(read.read<Eigen::bfloat16>("BF16")), (std::vector<int>{0x3f80, 0xff85, 0x7f80}));
  // The other's are rounded, and a NaN is quiet then.
  EXPECT_EQ(bits(read.read<Eigen::half>("BF16")), (std::vector<int>{0x3c00, 0xfe28, 0x7c00}));
  EXPECT_EQ(bits(read.read<Eigen::bfloat16>("F16")), (std::vector<int>{0x3f80, 0xffc0, 0x7f80}));
}

TEST(SafetensorsFile, RoundsDoublesToFloats) {
  SafetensorsWriter writer;
  add(writer, "x", std::vector<double>{0.1, 1e300, -1e300, 1e-300, 0x1p-149});
  EXPECT_EQ(reread(writer).read<float>("x"),
            (std::vector<float>{0.1F, std::numeric_limits<float>::infinity(),
                                -std::numeric_limits<float>::infinity(), 0, 0x1p-149F}));
}

TEST(SafetensorsFile, ReadsBools) {
  SafetensorsWriter writer;
  Tensor<bool, 2> mask(2, 2);
  mask.setValues({{true, false}, {false, true}});
  writer.add("mask", mask);
  add(writer, "bytes", std::vector<std::uint8_t>{0, 1});
  const auto read = reread(writer);
  EXPECT_EQ(to_string(read.entry("mask")), "BOOL [2, 2]");
  const auto again = read.tensor<bool, 2>("mask");
  EXPECT_TRUE(again(0, 0) && !again(0, 1) && !again(1, 0) && again(1, 1));
  EXPECT_EQ(read.read<std::int64_t>("mask"), (std::vector<std::int64_t>{1, 0, 0, 1}));
  EXPECT_TRUE((read.tensor<bool, 1>("bytes")(1)));
}

// ---- Dtypes that are not converted ----

TEST(SafetensorsFile, MayHoldDtypesThatItDoesNotConvert) {
  const std::vector<std::pair<std::string, std::size_t>> bytes_of_four{
      {"C64", 32}, {"F8_E5M2", 4}, {"F8_E4M3", 4}, {"F8_E8M0", 4}, {"F6_E3M2", 3}, {"F6_E2M3", 3},
      {"F4", 2},   {"C128", 64},   {"F33", 5},     {"f32", 16},    {"", 1},        {"\\n", 0}};
  for (const auto& [dtype, size] : bytes_of_four) {
    const std::string end = std::to_string(size);
    const auto read = SafetensorsFile::from_bytes(
        file(R"({"known":{"dtype":"U8","shape":[2],"data_offsets":[)" + end + "," +
                 std::to_string(size + 2) + R"(]},"x":{"dtype":")" + dtype +
                 R"(","shape":[2,2],"data_offsets":[0,)" + end + "]}}",
             std::string(size + 2, '\1')),
        "file");
    EXPECT_EQ(read.read<std::uint8_t>("known"), (std::vector<std::uint8_t>{1, 1})) << dtype;
    EXPECT_EQ(read.entry("x").bytes.size(), size) << dtype;
    EXPECT_EQ(read.entry("x").size(), 4) << dtype;
    const auto refused = [&](const auto& run) {
      const std::string message = message_of<SafetensorsError>(run);
      EXPECT_TRUE(message.starts_with("file: tensor 'x': expected ")) << message;
      const std::string shown = dtype == "\\n" ? "\\x0a" : dtype;
      EXPECT_TRUE(message.find("got " + shown + " [2, 2]") != std::string::npos ||
                  message.find("got '" + shown + "' [2, 2]") != std::string::npos)
          << message;
    };
    refused([&] { read.read<float>("x"); });
    refused([&] { read.read<double>("x"); });
    refused([&] { read.read<std::int64_t>("x"); });
    refused([&] { read.read<std::uint8_t>("x"); });
    refused([&] { read.tensor<bool, 2>("x"); });
    refused([&] {
      std::array<float, 4> out;
      read.read_into<float>("x", out);
    });
  }
}

// ---- What is asked for and not there ----

class Refusal : public testing::Test {
 protected:
  Refusal() {
    SafetensorsWriter writer;
    add(writer, "float", std::vector<float>{1, 2});
    add(writer, "int", std::vector<std::int32_t>{3});
    add(writer, "u64", std::vector<std::uint64_t>{1, std::uint64_t{1} << 63});
    add(writer, "u8", std::vector<std::uint8_t>{0, 1, 2});
    writer.add_bytes("bool", Dtype::Boolean, {1, 2}, to_bytes(std::string("\1\xff", 2)));
    read_ = std::make_unique<SafetensorsFile>(reread(writer));
  }

  template <typename Run>
  void expect(const Run& run, const std::string& tensor, const std::string& text,
              std::uint64_t element_offset = 0) {
    try {
      run(*read_);
      FAIL() << "no exception";
    } catch (const SafetensorsError& error) {
      EXPECT_EQ(error.tensor(), tensor);
      EXPECT_NE(std::string(error.what()).find(text), std::string::npos) << error.what();
      EXPECT_NE(std::string(error.what()).find("'" + tensor + "'"), std::string::npos);
      EXPECT_EQ(error.offset(),
                read_->contains(tensor) ? read_->entry(tensor).offset + element_offset : 0);
    }
  }

  std::unique_ptr<SafetensorsFile> read_;
};

TEST_F(Refusal, NamesTheTensorAndWhatCame) {
  using File = const SafetensorsFile&;
  expect([](File f) { f.entry("nothing"); }, "nothing", "no such tensor");
  expect([](File f) { f.read<float>("nothing"); }, "nothing", "no such tensor");
  expect([](File f) { f.read<float>("int"); }, "int",
         "expected F64, F32, F16 or BF16, got I32 [1]");
  expect([](File f) { f.read<double>("bool"); }, "bool", "got BOOL [1, 2]");
  expect([](File f) { f.read<std::int64_t>("float"); }, "float",
         "expected integers or BOOL, got F32");
  expect([](File f) { f.read<std::uint8_t>("int"); }, "int", "expected U8 or BOOL, got I32");
  expect([](File f) { f.tensor<bool, 1>("int"); }, "int", "expected U8 or BOOL, got I32");
  expect([](File f) { f.tensor<float, 2>("float"); }, "float",
         "expected 2 dimensions, got F32 [2]");
  expect([](File f) { f.scalar<float>("float"); }, "float", "expected one element, got F32 [2]");
  expect(
      [](File f) {
        std::array<float, 3> out;
        f.read_into<float>("float", out);
      },
      "float", "expected 3 elements, got F32 [2]");
}

TEST_F(Refusal, NamesTheElementThatDoesNotConvert) {
  using File = const SafetensorsFile&;
  expect([](File f) { f.read<std::int64_t>("u64"); }, "u64",
         "expected at most 2^63 - 1, got 9223372036854775808", 8);
  expect([](File f) { f.tensor<bool, 2>("bool"); }, "bool", "expected 0 or 1, got 255", 1);
  expect([](File f) { f.read<std::int64_t>("bool"); }, "bool", "expected 0 or 1, got 255", 1);
  expect([](File f) { f.read<std::uint8_t>("bool"); }, "bool", "expected 0 or 1, got 255", 1);
  expect([](File f) { f.tensor<bool, 1>("u8"); }, "u8", "expected 0 or 1, got 2", 2);
  EXPECT_EQ(read_->read<std::uint8_t>("u8")[2], 2);
}

// ---- Files ----

TEST(SafetensorsFile, IsMappedAndOutlivesItsName) {
  const TemporaryFolder folder;
  const auto path = folder / "x.safetensors";
  SafetensorsWriter writer;
  add(writer, "x", std::vector<float>(5000, 7));
  writer.write(path);
  std::unique_ptr<SafetensorsFile> first = std::make_unique<SafetensorsFile>(path);
  EXPECT_EQ(first->file_name(), path.string());
  const SafetensorsFile copy = *first;
  SafetensorsFile moved = std::move(*first);
  first.reset();

  SafetensorsWriter other;
  add(other, "y", std::vector<float>(3, 8));
  other.write(path);
  EXPECT_EQ(copy.read<float>("x"), std::vector<float>(5000, 7));
  EXPECT_EQ(moved.read<float>("x"), std::vector<float>(5000, 7));
  std::filesystem::remove(path);
  EXPECT_EQ(copy.entry("x").bytes.size(), 20000U);
  moved = copy;
  EXPECT_EQ(moved.read<float>("x")[4999], 7);
}

TEST(SafetensorsFile, ThatCannotBeOpenedIsAnError) {
  const TemporaryFolder folder;
  const auto open = [](const std::filesystem::path& path) {
    return message_of<SafetensorsError>([&] { SafetensorsFile{path}; });
  };
  EXPECT_NE(open(folder / "none").find("none: cannot be opened: no such file"), std::string::npos);
  EXPECT_NE(open(folder.path()).find("expected a regular file"), std::string::npos);
  EXPECT_NE(open("").find("cannot be opened"), std::string::npos);
}

TEST(SafetensorsFile, IsTheSameMappedAndRead) {
  const TemporaryFolder folder;
  const auto path = folder / "x";
  SafetensorsWriter writer;
  add(writer, "x", std::vector<float>(5000, 7));
  writer.write(path);
  const SafetensorsFile mapped(path, FileAccess::map);
  const SafetensorsFile read(path, FileAccess::read);
  EXPECT_EQ(mapped.read<float>("x"), read.read<float>("x"));
  EXPECT_EQ(to_string(mapped.entry("x")), to_string(read.entry("x")));
  EXPECT_EQ(read.file_name(), path.string());
  EXPECT_EQ(read.entry("x").file, path.string());
}

// A mapped one would end the process.
TEST(SafetensorsFile, ThatWasReadMayBeShortened) {
  const TemporaryFolder folder;
  const auto path = folder / "x";
  SafetensorsWriter writer;
  add(writer, "x", std::vector<float>(100'000, 7));
  writer.write(path);
  const SafetensorsFile file(path, FileAccess::read);
  std::filesystem::resize_file(path, 100);
  EXPECT_EQ(file.read<float>("x"), std::vector<float>(100'000, 7));
  EXPECT_THROW(SafetensorsFile(path, FileAccess::read), SafetensorsError);
}

#ifdef __linux__
// As one that others shorten while it is read: the system says that it has a page, of which it
// gives a part.
TEST(SafetensorsFile, ThatIsShorterThanTheSystemSaysIsAnError) {
  const std::filesystem::path path = "/sys/devices/system/cpu/online";
  std::error_code error;
  if (std::filesystem::file_size(path, error) < 100 || error) GTEST_SKIP() << "no " << path;
  const std::string message =
      message_of<SafetensorsError>([&] { SafetensorsFile(path, FileAccess::read); });
  EXPECT_NE(message.find("cannot be read: expected "), std::string::npos) << message;
  EXPECT_NE(message.find("because others shortened it"), std::string::npos) << message;
}
#endif

#ifndef _WIN32
TEST(SafetensorsFile, ThatIsNoneIsRefusedWithoutWaiting) {
  const TemporaryFolder folder;
  const auto open = [](const std::filesystem::path& path) {
    for (const FileAccess access : {FileAccess::map, FileAccess::read}) {
      const std::string message =
          message_of<SafetensorsError>([&] { SafetensorsFile(path, access); });
      if (access == FileAccess::read) return message;
    }
    return std::string();
  };
  ASSERT_EQ(::mkfifo((folder / "pipe").c_str(), 0600), 0);
  EXPECT_NE(open(folder / "pipe").find("expected a regular file, got a pipe"), std::string::npos);
  EXPECT_NE(open("/dev/null").find("expected a regular file, got a device"), std::string::npos);
  EXPECT_NE(open(folder.path()).find("expected a regular file, got a folder"), std::string::npos);
  std::filesystem::create_symlink("none", folder / "link");
  EXPECT_NE(open(folder / "link").find("no such file"), std::string::npos);
  std::filesystem::create_symlink("circle", folder / "circle");
  EXPECT_NE(open(folder / "circle").find("cannot be opened: "), std::string::npos);
  const ::sockaddr_un address = [&] {
    ::sockaddr_un named = {};
    named.sun_family = AF_UNIX;
    (folder / "socket").string().copy(named.sun_path, sizeof(named.sun_path) - 1);
    return named;
  }();
  const int socket = ::socket(AF_UNIX, SOCK_STREAM, 0);
  ASSERT_EQ(::bind(socket, reinterpret_cast<const ::sockaddr*>(&address), sizeof(address)), 0);
  EXPECT_NE(open(folder / "socket").find("expected a regular file, got a socket"),
            std::string::npos);
  ::close(socket);
}

TEST(SafetensorsFile, SaysWhatIsForbidden) {
  const TemporaryFolder folder;
  std::filesystem::permissions(folder.path(), std::filesystem::perms::all);
  SafetensorsWriter().write(folder / "secret");
  std::filesystem::create_directory(folder / "closed");
  SafetensorsWriter().write(folder / "closed" / "x");
  ASSERT_EQ(::chmod((folder / "secret").c_str(), 0), 0);
  ASSERT_EQ(::chmod((folder / "closed").c_str(), 0), 0);
  {
    const WithoutRoot guard;
    for (const char* name : {"secret", "closed/x", "closed/none"})
      EXPECT_EQ(message_of<SafetensorsError>([&] { SafetensorsFile(folder / name); }),
                (folder / name).string() + ": cannot be opened: permission denied");
  }
  ASSERT_EQ(::chmod((folder / "closed").c_str(), 0777), 0);
}
#endif

// ---- What is written ----

TEST(SafetensorsWriter, ComesBackInEveryDtype) {
  SafetensorsWriter writer;
  std::map<std::string, Bytes> expected;
  for (const detail::DtypeTraits& traits : detail::dtype_table) {
    if (traits.dtype == Dtype::Other) continue;
    Bytes bytes(traits.bits);  // of eight elements
    for (std::size_t i = 0; i < bytes.size(); ++i) bytes[i] = static_cast<std::byte>(7 * i + 1);
    const std::string name(traits.name);
    writer.add_bytes(name, traits.dtype, {1, 2, 4}, bytes);
    expected[name] = bytes;
  }
  const auto read = reread(writer);
  EXPECT_EQ(read.names().size(), 20U);
  for (const auto& [name, bytes] : expected) {
    const TensorEntry& entry = read.entry(name);
    EXPECT_EQ(name_of(entry.dtype), name);
    EXPECT_EQ(entry.shape, (std::vector<Index>{1, 2, 4}));
    EXPECT_EQ(entry.size(), 8);
    EXPECT_EQ(Bytes(entry.bytes.begin(), entry.bytes.end()), bytes);
  }
}

TEST(SafetensorsWriter, WritesEigenTypesRowMajor) {
  SafetensorsWriter writer;
  Eigen::Matrix<float, 2, 3> columns;  // column-major
  columns << 1, 2, 3, 4, 5, 6;
  writer.add("matrix", columns);
  writer.add("expression", 2 * columns.transpose());
  writer.add("row_matrix", RowMatrix<double>(columns.cast<double>()));
  writer.add("vector", Vector<double>(Vector<double>::LinSpaced(3, 0, 1)));
  Tensor<std::int64_t, 3> tokens(1, 2, 2);
  tokens.setValues({{{1, 2}, {3, 4}}});
  writer.add("tensor", tokens);
  writer.add("view", TensorView<std::int64_t, 2>(tokens.data(), {4, 1}));
  writer.add("number", Tensor<float, 0>());
  writer.add("empty", RowMatrix<float>(0, 5));
  const auto read = reread(writer);
  EXPECT_EQ(to_string(read.entry("matrix")), "F32 [2, 3]");
  EXPECT_EQ(read.read<float>("matrix"), (std::vector<float>{1, 2, 3, 4, 5, 6}));
  EXPECT_EQ(to_string(read.entry("expression")), "F32 [3, 2]");
  EXPECT_EQ(read.read<float>("expression"), (std::vector<float>{2, 8, 4, 10, 6, 12}));
  EXPECT_EQ(to_string(read.entry("row_matrix")), "F64 [2, 3]");
  EXPECT_EQ(read.read<double>("row_matrix"), (std::vector<double>{1, 2, 3, 4, 5, 6}));
  EXPECT_EQ(to_string(read.entry("vector")), "F64 [3]");
  EXPECT_EQ(read.read<double>("vector"), (std::vector<double>{0, .5, 1}));
  EXPECT_EQ(to_string(read.entry("tensor")), "I64 [1, 2, 2]");
  EXPECT_EQ((read.tensor<std::int64_t, 3>("tensor")(0, 1, 0)), 3);
  EXPECT_EQ(to_string(read.entry("view")), "I64 [4, 1]");
  EXPECT_EQ(to_string(read.entry("number")), "F32 []");
  EXPECT_EQ(to_string(read.entry("empty")), "F32 [0, 5]");
  EXPECT_EQ((read.tensor<float, 2>("empty").dimension(1)), 5);
}

TEST(SafetensorsWriter, RoundsToANarrowerDtype) {
  SafetensorsWriter writer;
  const Vector<double> values = (Vector<double>(3) << 1 + 0x1p-11 + 0x1p-40, 1e6, -0.1).finished();
  writer.add("F64", values, Dtype::F64);
  writer.add("F32", values, Dtype::F32);
  writer.add("F16", values, Dtype::F16);
  writer.add("BF16", values, Dtype::BF16);
  writer.add("wider", values.cast<float>(), Dtype::F64);
  const auto read = reread(writer);
  for (const auto& name : {"F64", "F32", "F16", "BF16"})
    EXPECT_EQ(name_of(read.entry(name).dtype), name);
  EXPECT_EQ(read.read<double>("F64")[2], -0.1);
  EXPECT_EQ(read.read<float>("F32")[2], -0.1F);
  EXPECT_EQ(read.read<double>("wider")[2], static_cast<double>(-0.1F));
  EXPECT_EQ(read.read<double>("F16"),
            (std::vector<double>{1 + 0x1p-10, std::numeric_limits<double>::infinity(),
                                 -0.0999755859375}));
  EXPECT_EQ(read.read<double>("BF16"), (std::vector<double>{1, 999424, -0.10009765625}));
}

TEST(SafetensorsWriter, AlignsTensorsAndPadsTheHeader) {
  for (std::size_t length = 0; length < 17; ++length) {
    SafetensorsWriter writer;
    add(writer, "a", std::vector<std::uint8_t>{1, 2, 3});
    add(writer, "b" + std::string(length, 'x'), std::vector<double>{1});
    add(writer, "c", std::vector<float>{1});
    add(writer, "d", std::vector<std::int16_t>{1});
    writer.add_bytes("e", Dtype::F4, {2, 3}, to_bytes("abc"));
    writer.add_bytes("f", Dtype::C64, {1}, to_bytes("12345678"));
    const Bytes bytes = writer.bytes();
    EXPECT_EQ(detail::load_element<std::uint64_t>(bytes.data()) % 8, 0U);
    const auto read = SafetensorsFile::from_bytes(bytes);
    for (const auto& named : read.entries())
      EXPECT_EQ(named.second.offset % std::max<std::size_t>(size_of(named.second.dtype), 1), 0U)
          << named.first;
  }
}

TEST(SafetensorsWriter, WritesTheSameBytesForAnyOrder) {
  SafetensorsWriter forwards;
  SafetensorsWriter backwards;
  for (int i = 0; i < 20; ++i) {
    add(forwards, std::to_string(i), std::vector<std::int32_t>{i});
    add(backwards, std::to_string(19 - i), std::vector<std::int32_t>{19 - i});
  }
  forwards.set_metadata("a", "old");
  forwards.set_metadata("b", "2");
  forwards.set_metadata("a", "1");
  backwards.set_metadata("b", "2");
  backwards.set_metadata("a", "1");
  EXPECT_EQ(forwards.bytes(), backwards.bytes());
}

TEST(SafetensorsWriter, MergesAllOrNothing) {
  SafetensorsWriter one;
  add(one, "a", std::vector<float>{1});
  one.set_metadata("x", "of one");
  one.set_metadata("y", "of one");
  SafetensorsWriter two;
  add(two, "b", std::vector<float>{2});
  two.set_metadata("x", "of two");
  SafetensorsWriter same = two;
  add(same, "a", std::vector<float>{3});
  const Bytes before = one.bytes();
  const Bytes of_same = same.bytes();
  EXPECT_THROW(one.merge(same), std::invalid_argument);
  EXPECT_EQ(one.bytes(), before);
  EXPECT_EQ(same.bytes(), of_same);
  one.merge(two);
  const auto read = reread(one);
  EXPECT_EQ(read.names(), (std::vector<std::string>{"a", "b"}));
  EXPECT_EQ(read.metadata(),
            (std::map<std::string, std::string>{{"x", "of two"}, {"y", "of one"}}));
  EXPECT_EQ(two.bytes(), file("{}      "));
}

TEST(SafetensorsWriter, WritesAHeaderThatIsJson) {
  SafetensorsWriter writer;
  writer.set_metadata("key \"quoted\"", "line\nbreak \xc3\xa9");
  add(writer, "a\"b\\c", std::vector<std::uint8_t>{1});
  const Bytes bytes = writer.bytes();
  const auto size = detail::load_element<std::uint64_t>(bytes.data());
  const auto* text = reinterpret_cast<const char*>(bytes.data()) + 8;
  const auto header = nlohmann::json::parse(text, text + size);
  EXPECT_EQ(header["__metadata__"]["key \"quoted\""], "line\nbreak \xc3\xa9");
  EXPECT_EQ(header["a\"b\\c"]["data_offsets"], (std::vector<int>{0, 1}));
  EXPECT_EQ(reread(writer).metadata().at("key \"quoted\""), "line\nbreak \xc3\xa9");
}

TEST(SafetensorsWriter, WithoutAnythingWritesAFile) {
  EXPECT_EQ(SafetensorsWriter().bytes(), file("{}      "));
}

TEST(SafetensorsWriter, RejectsWhatTheFormatCannotHold) {
  SafetensorsWriter writer;
  const std::vector<float> two{1, 2};
  add(writer, "x", two);
  const auto rejected = [&](const std::string& name, std::vector<Index> shape,
                            std::optional<Dtype> stored = {}) {
    return message_of<std::invalid_argument>([&] { writer.add(name, shape, two, stored); });
  };
  EXPECT_EQ(rejected("x", {2}), "name: expected one that was not added before, got 'x'");
  EXPECT_NE(rejected("__metadata__", {2}).find("'__metadata__'"), std::string::npos);
  EXPECT_NE(rejected("\xff", {2}).find("name: expected UTF-8, got '\\xff'"), std::string::npos);
  EXPECT_NE(rejected("y", {3}).find("expected 12 bytes for 'y', got 8"), std::string::npos);
  EXPECT_NE(rejected("y", {}).find("expected 4 bytes"), std::string::npos);
  EXPECT_NE(rejected("y", {-1, -2}).find("shape: expected extents of at least 0, got -1"),
            std::string::npos);
  EXPECT_NE(rejected("y", {Index{1} << 40, Index{1} << 40}).find("fewer than 2^63"),
            std::string::npos);
  EXPECT_NE(rejected("y", std::vector<Index>(65, 1)).find("at most 64 dimensions, got 65"),
            std::string::npos);
  EXPECT_NE(message_of<std::invalid_argument>([&] {
              writer.add_bytes("y", Dtype::F4, {3}, to_bytes("ab"));
            }).find("expected whole bytes, fewer than 2^63 for 'y', got 2"),
            std::string::npos);
  EXPECT_NE(message_of<std::invalid_argument>([&] {
              writer.add_bytes("y", Dtype::Other, {2}, to_bytes("ab"));
            }).find("dtype: expected one that this library knows"),
            std::string::npos);
  EXPECT_NE(rejected("y", {2}, Dtype::I32).find("F64, F32, F16 or BF16, got I32"),
            std::string::npos);
  EXPECT_THROW(writer.add("y", {1}, std::array<std::int32_t, 1>{}, Dtype::F32),
               std::invalid_argument);
  EXPECT_THROW(writer.set_metadata("key", "\xc3"), std::invalid_argument);
  EXPECT_THROW(writer.set_metadata("\xc3", "text"), std::invalid_argument);
  EXPECT_EQ(reread(writer).names(), std::vector<std::string>{"x"});
}

TEST(SafetensorsWriter, WritesAFileWithoutLeavingOthers) {
  const TemporaryFolder folder;
  SafetensorsWriter writer;
  add(writer, "x", std::vector<float>(100'000, 1));
  writer.write(folder / "x.safetensors");
  writer.write(folder / "x.safetensors");
  EXPECT_EQ(folder.number_of_files(), 1U);
  const Bytes bytes = writer.bytes();
  EXPECT_EQ(to_bytes(read_file(folder / "x.safetensors")), bytes);
}

TEST(SafetensorsWriter, LeavesTheOldFileWhereItCannotWrite) {
  const TemporaryFolder folder;
  SafetensorsWriter writer;
  add(writer, "x", std::vector<float>{1});
  const auto error = message_of<SafetensorsError>([&] { writer.write(folder / "none" / "x"); });
  EXPECT_NE(error.find("cannot be written"), std::string::npos) << error;
  const auto into_folder = message_of<SafetensorsError>([&] { writer.write(folder.path()); });
  EXPECT_NE(into_folder.find("expected a regular file or a new name"), std::string::npos);
  EXPECT_EQ(folder.number_of_files(), 0U);
}

}  // namespace safetensors_test
