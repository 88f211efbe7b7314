// SPDX-License-Identifier: MIT
/// \file
/// What all ranks must be the same in before they exchange anything.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <exception>
#include <limits>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

#include <local_mha/mpi/communicator.hpp>

namespace local_mha::inline LOCAL_MHA_ABI::mpi::detail {

/// A checksum of 64 bits: the same for the same bytes in the same order.
class Checksum {
 public:
  void add(const void* bytes, std::size_t size) {
    const auto* from = static_cast<const unsigned char*>(bytes);
    for (; size >= sizeof(std::uint64_t); size -= sizeof(std::uint64_t)) {
      std::uint64_t word = 0;
      std::memcpy(&word, from, sizeof(word));
      mix(word);
      from += sizeof(word);
    }
    std::uint64_t word = 0;
    // Of nothing, there may be no address.
    if (size > 0) std::memcpy(&word, from, size);
    mix(word ^ std::uint64_t{size} << 56);
  }
  template <typename Number>
    requires std::is_arithmetic_v<Number>
  void add(Number number) {
    add_numbers(&number, 1);
  }
  void add(std::string_view text) { add(text.data(), text.size()); }
  /// Numbers of any type that may be copied as bytes, but for bytes that are none of the number.
  template <typename Scalar>
  void add_numbers(const Scalar* numbers, std::size_t size) {
    constexpr std::size_t bytes = value_bytes<Scalar>();
    if constexpr (bytes == sizeof(Scalar))
      add(static_cast<const void*>(numbers), size * sizeof(Scalar));
    else
      for (std::size_t i = 0; i < size; ++i) add(static_cast<const void*>(numbers + i), bytes);
  }
  template <typename Number>
  void add(std::span<const Number> numbers) {
    add_numbers(numbers.data(), numbers.size());
  }

  std::uint64_t value() const { return value_; }

 private:
  // The processor's long double of 80 bits lies in 12 or 16 bytes, whose others are anything.
  template <typename Scalar>
  static constexpr std::size_t value_bytes() {
    if constexpr (std::is_same_v<Scalar, long double>)
      if (std::numeric_limits<Scalar>::digits == 64) return 10;
    return sizeof(Scalar);
  }

  // A bijection of the state for each word, so that no two words give the same.
  void mix(std::uint64_t word) {
    value_ = (value_ ^ word) * 0x9E3779B97F4A7C15U;
    value_ ^= value_ >> 32;
  }

  std::uint64_t value_ = 0x243F6A8885A308D3U;
};

/// Collects what a call rests on, and throws on every rank if one of them has found an error, or
/// they differ: see agree().
class Agreement {
 public:
  /// \param call what all ranks are about to do
  Agreement(const Communicator& communicator, std::string_view call)
      : communicator_(communicator), call_(call) {}

  /// \param find throws if something is wrong; after the first that does, no other is called
  template <typename Find>
  void check(Find&& find) {
    if (!error_.empty()) return;
    try {
      std::forward<Find>(find)();
    } catch (const std::exception& error) {
      error_ = error.what();
      if (error_.empty()) error_ = "an exception";
      exception_ = std::current_exception();
    }
  }

  /// A number that must be the same on every rank.
  void same(std::string_view name, std::uint64_t number) {
    values_.push_back({std::string(name), number, true});
  }
  void same(std::string_view name, Index number) { same(name, static_cast<std::uint64_t>(number)); }
  /// Something of which only that is known whether it is the same.
  void same(std::string_view name, const Checksum& checksum) {
    values_.push_back({std::string(name), checksum.value(), false});
  }

  /// \throws std::invalid_argument on every rank, and on the one that has found an error what that
  ///         has thrown
  void settle() {
    Communicator::require_running();
    communicator_.clear_agreed_error();
    Checksum call;
    call.add(call_);
    for (const Value& value : values_) call.add(value.name);
    const auto size = static_cast<std::uint64_t>(communicator_.size());
    const std::uint64_t me =
        error_.empty() ? size : static_cast<std::uint64_t>(communicator_.rank());
    // The least of a number and of its complement: they are the same where that is their own.
    std::uint64_t first[3] = {me, call.value(), ~call.value()};
    least(first, 3);
    if (first[0] < size) tell(static_cast<int>(first[0]));
    if (first[1] != ~first[2]) fail("call", "the same on every rank", "another than " + call_);
    std::vector<std::uint64_t> all;
    for (const Value& value : values_) {
      all.push_back(value.number);
      all.push_back(~value.number);
    }
    least(all.data(), all.size());
    for (std::size_t i = 0; i < values_.size(); ++i) {
      const std::uint64_t smallest = all[2 * i], largest = ~all[2 * i + 1];
      if (smallest == largest) continue;
      fail(values_[i].name, "the same on every rank",
           values_[i].plain
               ? std::to_string(smallest) + " on one and " + std::to_string(largest) + " on another"
               : "others on some");
    }
    communicator_.note_agreement();
  }

 private:
  struct Value {
    std::string name;
    std::uint64_t number;
    bool plain;
  };

  void least(std::uint64_t* numbers, std::size_t count) const {
    const Waiting waiting(communicator_);
    check_mpi(MPI_Allreduce(MPI_IN_PLACE, numbers, static_cast<int>(count), MPI_UINT64_T, MPI_MIN,
                            communicator_.get()));
  }
  static void check_mpi(int result) { detail::check(result, "MPI_Allreduce"); }

  [[noreturn]] void fail(std::string_view name, std::string_view expected,
                         const std::string& got) const {
    communicator_.agreed([&] { reject(name, expected, got); });
    std::terminate();
  }

  // What the first rank with an error has found.
  [[noreturn]] void tell(int rank) const {
    std::uint64_t length = error_.size();
    detail::check(MPI_Bcast(&length, 1, MPI_UINT64_T, rank, communicator_.get()), "MPI_Bcast");
    std::string text = error_;
    text.resize(static_cast<std::size_t>(length));
    detail::check(
        MPI_Bcast(text.data(), static_cast<int>(length), MPI_CHAR, rank, communicator_.get()),
        "MPI_Bcast");
    communicator_.agreed([&] {
      if (exception_) std::rethrow_exception(exception_);
      throw std::invalid_argument(text + " (on rank " + std::to_string(rank) + ")");
    });
    std::terminate();
  }

  const Communicator& communicator_;
  std::string call_;
  std::string error_;
  std::exception_ptr exception_;
  std::vector<Value> values_;
};

/// Before a call: collective. What a rank has no memory for on the way ends them all.
///
///     agree(communicator, "forward", [&](Agreement& agreement) {
///       agreement.check([&] { … });  // what a rank can see alone
///       agreement.same("batch", batch);
///     });
///
/// \param say `say(agreement)` names what the call rests on
/// \throws see Agreement::settle()
template <typename Say>
void agree(const Communicator& communicator, std::string_view call, Say&& say) {
  Communicator::require_running();
  communicator.alone([&] {
    Agreement agreement(communicator, call);
    std::forward<Say>(say)(agreement);
    agreement.settle();
  });
}

}  // namespace local_mha::inline LOCAL_MHA_ABI::mpi::detail
