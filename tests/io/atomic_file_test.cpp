// SPDX-License-Identifier: MIT
// Files that appear as a whole: what they replace, and what is left where something goes wrong.
#include <gtest/gtest.h>

#include <cerrno>
#include <cstdlib>
#include <filesystem>
#include <string>
#include <system_error>
#include <vector>

#include <local_mha/io/atomic_file.hpp>

#include "io/file_builder.hpp"

#ifndef _WIN32
#include <fcntl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <csignal>
#include <cstdarg>
#include <utility>

#include "io/without_root.hpp"
#endif

#ifdef __linux__
namespace {
struct Disk {
  std::filesystem::path watched = {};  // whose content is looked at when a folder is synced
  std::string seen = {};
  int files = 0;  // that were synced
  int folders = 0;
  bool fails_to_sync_files = false;
  bool fails_to_sync_folders = false;
  bool fails_to_close = false;
};
Disk* disk = nullptr;
}  // namespace

// Replaced in this program, to see what reaches the disk, and when.
extern "C" int fsync(int descriptor) {
  struct ::stat status = {};
  if (disk != nullptr && ::fstat(descriptor, &status) == 0) {
    const bool is_folder = S_ISDIR(status.st_mode);
    ++(is_folder ? disk->folders : disk->files);
    if (is_folder) disk->seen = io_test::read_file(disk->watched);
    if (is_folder ? disk->fails_to_sync_folders : disk->fails_to_sync_files) {
      errno = EIO;
      return -1;
    }
  }
  return static_cast<int>(::syscall(SYS_fsync, descriptor));
}

namespace {
/// Called before a file is opened, with its name; null: nothing is.
void (*before_open)(const char* path) = nullptr;
/// With which a file was made last.
::mode_t mode_at_creation = 0;
}  // namespace

extern "C" int open(const char* path, int flags, ...) {
  ::mode_t mode = 0;
  if ((flags & O_CREAT) != 0) {
    std::va_list arguments;
    va_start(arguments, flags);
    mode = va_arg(arguments, ::mode_t);
    va_end(arguments);
    mode_at_creation = mode;
  }
  if (auto* const call = std::exchange(before_open, nullptr); call != nullptr) call(path);
  return static_cast<int>(::syscall(SYS_openat, AT_FDCWD, path, flags, mode));
}

extern "C" int close(int descriptor) {
  const auto closed = static_cast<int>(::syscall(SYS_close, descriptor));
  if (disk == nullptr || !disk->fails_to_close) return closed;
  errno = EIO;
  return -1;
}
#endif

namespace atomic_file_test {

using namespace local_mha::io;
using namespace io_test;
namespace fs = std::filesystem;

void replace(const fs::path& path, const std::string& text) {
  AtomicFile file(path);
  file.write(to_bytes(text));
  file.commit();
}

std::string refusal(const fs::path& path) {
  return message_of<SafetensorsError>([&] { replace(path, "new"); });
}

TEST(AtomicFile, IsNotSeenBeforeItIsCommitted) {
  const TemporaryFolder folder;
  write_file(folder / "x", to_bytes("old"));
  {
    AtomicFile file(folder / "x");
    file.write(to_bytes("half"));
    EXPECT_EQ(read_file(folder / "x"), "old");
  }
  EXPECT_EQ(read_file(folder / "x"), "old");
  EXPECT_EQ(folder.number_of_files(), 1U);
  AtomicFile file(folder / "x");
  file.write(to_bytes("n"));
  file.write({});
  file.write(to_bytes("ew"));
  file.commit();
  EXPECT_EQ(read_file(folder / "x"), "new");
  EXPECT_EQ(folder.number_of_files(), 1U);
}

TEST(AtomicFile, FollowsALinkToTheFileItStandsFor) {
  const TemporaryFolder folder;
  write_file(folder / "target", to_bytes("old"));
  std::error_code unsupported;
  std::filesystem::create_symlink(folder / "target", folder / "link", unsupported);
  if (unsupported) GTEST_SKIP() << "no symbolic links here";
  AtomicFile file(folder / "link");
  file.write(to_bytes("new"));
  file.commit();
  EXPECT_EQ(read_file(folder / "target"), "new");
  EXPECT_TRUE(std::filesystem::is_symlink(folder / "link"));
}

TEST(AtomicFile, MakesWhatALinkToNothingPointsTo) {
  const TemporaryFolder folder;
  fs::create_directory(folder / "models");
  std::error_code unsupported;
  fs::create_symlink("models/target", folder / "link", unsupported);
  if (unsupported) GTEST_SKIP() << "no symbolic links here";
  fs::create_symlink("link", folder / "link to the link");
  replace(folder / "link to the link", "new");
  EXPECT_TRUE(fs::is_symlink(folder / "link to the link"));
  EXPECT_TRUE(fs::is_symlink(folder / "link"));
  EXPECT_FALSE(fs::is_symlink(folder / "models/target"));
  EXPECT_EQ(read_file(folder / "models/target"), "new");

  fs::create_symlink("none/target", folder / "nowhere");
  const std::string error = refusal(folder / "nowhere");
  EXPECT_EQ(error,
            (folder / "none/target").string() + ": cannot be written: no such file or folder");
  fs::create_symlink("circle", folder / "circle");
  EXPECT_NE(refusal(folder / "circle").find("cannot be written"), std::string::npos);
  EXPECT_TRUE(fs::is_symlink(folder / "circle"));
}

TEST(AtomicFile, IsWrittenOnce) {
  const TemporaryFolder folder;
  AtomicFile file(folder / "x");
  file.commit();
  EXPECT_THROW(file.write(to_bytes("more")), SafetensorsError);
  EXPECT_THROW(file.commit(), SafetensorsError);
  EXPECT_EQ(read_file(folder / "x"), "");
  EXPECT_EQ(folder.number_of_files(), 1U);
}

TEST(AtomicFile, NeedsAName) {
  const TemporaryFolder folder;
  for (const fs::path& path : {fs::path(), folder / "", folder / "none/"})
    EXPECT_NE(refusal(path).find("expected a regular file or a new name"), std::string::npos)
        << path;
  EXPECT_NE(refusal(folder / "none/x").find("no such file or folder"), std::string::npos);
  EXPECT_EQ(folder.number_of_files(), 0U);
}

TEST(AtomicFile, RemovesItsTemporariesAlone) {
  const TemporaryFolder folder;
  const std::vector<std::string> others{"x",
                                        "x.tmp",
                                        "x.1.tmp",
                                        "x.0123456789abcdeg.tmp",
                                        "x.notes",
                                        "y.tmp",
                                        "x.0123456789abcdef",
                                        "x.0123456789ABCDEF.tmp",
                                        "x0123.tmp",
                                        "x.12345678.tmp",
                                        "xx.0123456789abcdef.tmp"};
  for (const std::string& other : others) write_file(folder / other, {});
  write_file(folder / "x.0123456789abcdef.tmp", {});
  {
    const AtomicFile unfinished(folder / "x");
    EXPECT_EQ(folder.number_of_files(), others.size() + 2);
    AtomicFile::remove_temporaries(folder / "x");
    EXPECT_EQ(folder.number_of_files(), others.size());
  }
  for (const std::string& other : others) EXPECT_TRUE(fs::exists(folder / other)) << other;
  AtomicFile::remove_temporaries(folder / "none/x");
  AtomicFile::remove_temporaries("");
}

#ifndef _WIN32

unsigned mode_of(const fs::path& path) {
  struct ::stat status = {};
  return ::stat(path.c_str(), &status) == 0 ? status.st_mode & 07777U : ~0U;
}

TEST(AtomicFile, KeepsTheModeOfWhatItReplaces) {
  const TemporaryFolder folder;
  const ::mode_t before = ::umask(022);
  replace(folder / "new", "x");
  EXPECT_EQ(mode_of(folder / "new"), 0644U);
  for (const unsigned mode : {0600U, 0640U, 0666U, 0777U, 0200U}) {
    write_file(folder / "x", to_bytes("old"));
    ASSERT_EQ(::chmod((folder / "x").c_str(), mode), 0);
    AtomicFile file(folder / "x");
    // Nor is what is being written for others to see.
    for (const auto& entry : fs::directory_iterator(folder.path()))
      if (entry.path().extension() == ".tmp") {
        EXPECT_EQ(mode_of(entry.path()), mode);
      }
    file.write(to_bytes("new"));
    file.commit();
    EXPECT_EQ(mode_of(folder / "x"), mode);
  }
  ::umask(before);
}

TEST(AtomicFile, DoesNotReplaceWhatMayNotBeWritten) {
  const TemporaryFolder folder;
  fs::permissions(folder.path(), fs::perms::all);
  write_file(folder / "kept", to_bytes("old"));
  ASSERT_EQ(::chmod((folder / "kept").c_str(), 0444), 0);
  fs::create_directory(folder / "closed");
  write_file(folder / "closed/x", to_bytes("old"));
  ASSERT_EQ(::chmod((folder / "closed").c_str(), 0), 0);
  fs::create_directory(folder / "full");
  ASSERT_EQ(::chmod((folder / "full").c_str(), 0555), 0);
  {
    const WithoutRoot guard;
    for (const char* name : {"kept", "closed/x", "full/x"})
      EXPECT_EQ(refusal(folder / name),
                (folder / name).string() + ": cannot be written: permission denied");
  }
  ASSERT_EQ(::chmod((folder / "closed").c_str(), 0777), 0);
  EXPECT_EQ(read_file(folder / "kept"), "old");
  EXPECT_EQ(read_file(folder / "closed/x"), "old");
  EXPECT_EQ(folder.number_of_files(), 3U);
}

TEST(AtomicFile, ThatGoesNowhereLeavesNothing) {
  const TemporaryFolder folder;
  ASSERT_EQ(::mkfifo((folder / "pipe").c_str(), 0600), 0);
  EXPECT_NE(refusal(folder / "pipe").find("expected a regular file"), std::string::npos);
  EXPECT_NE(refusal("/dev/null").find("expected a regular file"), std::string::npos);

  // As on a disk that is full.
  write_file(folder / "x", to_bytes("old"));
  struct ::rlimit before = {};
  ASSERT_EQ(::getrlimit(RLIMIT_FSIZE, &before), 0);
  struct ::rlimit small = before;
  small.rlim_cur = 1000;
  const auto handler = std::signal(SIGXFSZ, SIG_IGN);
  ASSERT_EQ(::setrlimit(RLIMIT_FSIZE, &small), 0);
  const auto error =
      message_of<SafetensorsError>([&] { replace(folder / "x", std::string(2000, 'x')); });
  ::setrlimit(RLIMIT_FSIZE, &before);
  std::signal(SIGXFSZ, handler);
  EXPECT_NE(error.find("x: cannot be written: "), std::string::npos) << error;
  EXPECT_EQ(read_file(folder / "x"), "old");
  EXPECT_EQ(folder.number_of_files(), 2U);
}

#ifdef __linux__
// Before it has the mode of what it replaces, others could open it.
TEST(AtomicFile, IsPrivateFromTheBeginningWhereItReplacesWhatIs) {
  const TemporaryFolder folder;
  for (const unsigned mode : {0600U, 0640U, 0666U}) {
    write_file(folder / "x", to_bytes("old"));
    ASSERT_EQ(::chmod((folder / "x").c_str(), mode), 0);
    mode_at_creation = 0777;
    replace(folder / "x", "new");
    EXPECT_EQ(mode_at_creation & ~mode, 0U) << mode;
  }
}

// Who may not give a file away keeps others out of it.
TEST(AtomicFile, ThatReplacesAnotherOwnersOpensItToNobodyElse) {
  if (::geteuid() != 0) GTEST_SKIP() << "needs root, to whom a file can belong or not";
  const TemporaryFolder folder;
  fs::permissions(folder.path(), fs::perms::all);
  const auto make = [&](unsigned mode) {
    fs::remove(folder / "x");
    write_file(folder / "x", to_bytes("old"));
    ASSERT_EQ(::chown((folder / "x").c_str(), 12345, 54321), 0);
    ASSERT_EQ(::chmod((folder / "x").c_str(), mode), 0);
  };
  struct ::stat status = {};
  make(06754);
  replace(folder / "x", "new");
  ASSERT_EQ(::stat((folder / "x").c_str(), &status), 0);
  EXPECT_EQ(status.st_uid, 12345U);
  EXPECT_EQ(status.st_gid, 54321U);
  EXPECT_EQ(status.st_mode & 07777U, 06754U);
  make(06772);
  {
    const WithoutRoot guard;
    replace(folder / "x", "new");
  }
  ASSERT_EQ(::stat((folder / "x").c_str(), &status), 0);
  EXPECT_EQ(read_file(folder / "x"), "new");
  EXPECT_NE(status.st_uid, 12345U);
  // Its group is another one, which may do what all may; nor does it run with anybody's rights.
  EXPECT_EQ(status.st_mode & 07777U, 0722U);
}

// What is read may become a pipe after it was looked at: nobody waits for a writer.
TEST(FileBytes, OfAFileThatBecomesAPipeIsAnError) {
  static const fs::path* path = nullptr;
  const TemporaryFolder folder;
  const fs::path name = folder / "x.safetensors";
  path = &name;
  write_file(name, to_bytes("old"));
  before_open = [](const char*) {
    fs::remove(*path);
    if (::mkfifo(path->c_str(), 0600) != 0) std::abort();
  };
  ::alarm(20);
  const auto error =
      message_of<SafetensorsError>([&] { detail::FileBytes::open(name, FileAccess::read); });
  ::alarm(0);
  EXPECT_NE(error.find("expected a regular file, got a pipe"), std::string::npos) << error;
}

TEST(AtomicFile, IsOnTheDiskBeforeItsNameAndTheNameBeforeCommitReturns) {
  const TemporaryFolder folder;
  Disk observed;
  observed.watched = folder / "x";
  disk = &observed;
  replace(folder / "x", "new");
  disk = nullptr;
  EXPECT_EQ(observed.files, 1);
  EXPECT_EQ(observed.folders, 1);
  EXPECT_EQ(observed.seen, "new");
}

TEST(AtomicFile, SaysWhereTheDiskFails) {
  for (bool Disk::* fails :
       {&Disk::fails_to_sync_files, &Disk::fails_to_close, &Disk::fails_to_sync_folders}) {
    const TemporaryFolder folder;
    write_file(folder / "x", to_bytes("old"));
    Disk failing;
    failing.*fails = true;
    disk = &failing;
    const std::string error = refusal(folder / "x");
    disk = nullptr;
    EXPECT_NE(error.find("x: cannot be written: "), std::string::npos);
    EXPECT_EQ(read_file(folder / "x"), failing.fails_to_sync_folders ? "new" : "old");
    EXPECT_EQ(folder.number_of_files(), 1U);
  }
}
#endif

#endif

}  // namespace atomic_file_test
