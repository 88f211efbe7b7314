// SPDX-License-Identifier: MIT
/// \file
/// A sequence that comes bit by bit, on its way through the layers of Encoder or LocalTransformer.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include <local_mha/core/block.hpp>
#include <local_mha/core/error.hpp>
#include <local_mha/core/types.hpp>
#include <local_mha/streaming/sequence_stream.hpp>

namespace local_mha::inline LOCAL_MHA_ABI::detail {

/// The last rows of the residual streams that wait for the attention's results, and their mask.
template <typename Scalar>
class WaitingRows {
 public:
  /// \param width numbers of a row
  /// \param wait rows stay for later calls; else each is needed at once
  WaitingRows(Index width, Index capacity, bool wait)
      : width_(width),
        capacity_(capacity),
        wait_(wait),
        rows_(make_block_buffer<Scalar>(wait ? width * capacity : 0)),
        masked_(static_cast<std::size_t>(capacity), 0) {}

  void put(Index row, const Scalar* x, std::uint8_t masked) {
    std::copy(x, x + width_, rows_.data() + row % capacity_ * width_);
    masked_[static_cast<std::size_t>(row % capacity_)] = masked;
    oldest_ = (std::max)(oldest_, row + 1 - capacity_);
  }
  const Scalar* row(Index row) const { return rows_.data() + row % capacity_ * width_; }
  std::uint8_t masked(Index row) const {
    return masked_[static_cast<std::size_t>(row % capacity_)];
  }
  /// Whether all rows from `begin` on are there: if so, all from any later one on are, too.
  bool hold(Index begin) const { return !wait_ || begin >= oldest_; }
  bool wait() const { return wait_; }
  void reset() { oldest_ = 0; }

  /// \param end one past the last row
  void save(Index end, StateWriter& to) const {
    const Index begin = wait_ ? oldest_ : end;
    to.put(static_cast<std::int64_t>(begin));
    for (Index i = begin; i < end; ++i) {
      to.put(row(i), width_);
      to.put(masked(i));
    }
  }
  /// \param rows that must be there
  void load(const Range& rows, StateReader& from) {
    oldest_ = 0;
    const Index begin = from.get_index(wait_ ? 0 : rows.end, rows.end);
    std::vector<Scalar> x(static_cast<std::size_t>(width_));
    for (Index i = begin; i < rows.end; ++i) {
      from.get(x.data(), width_);
      put(i, x.data(), from.get<std::uint8_t>());
    }
    oldest_ = (std::max)(oldest_, begin);
    if (!hold(rows.begin)) reject("state", "all rows that wait for the attention", "less");
  }

 private:
  Index width_;
  Index capacity_;
  bool wait_;
  BlockBuffer<Scalar> rows_;
  std::vector<std::uint8_t> masked_;
  Index oldest_ = 0;
};

/// A sequence on its way through all layers.
template <typename Scalar, typename Storage = Scalar>
class StreamedStack {
 public:
  using Stored = Storage;

  struct Layer {
    StreamedSequence<Scalar, Storage> attention;
    WaitingRows<Scalar> residual;
  };

  explicit StreamedStack(std::vector<Layer> layers) : layers_(std::move(layers)) {}

  std::vector<Layer>& layers() { return layers_; }
  Index position() const { return position_; }
  Index answered() const {
    return layers_.empty() ? position_ : layers_.back().attention.answered();
  }
  Index complete(Index positions) const {
    for (const Layer& layer : layers_) positions = layer.attention.complete(positions);
    return positions;
  }
  bool ended() const { return ended_; }
  void take(Index n) { position_ += n; }
  void end() { ended_ = true; }

  void reset() {
    position_ = 0;
    ended_ = false;
    for (Layer& layer : layers_) {
      layer.attention.reset();
      layer.residual.reset();
    }
  }

  Index most_rollback() const {
    return largest_rollback(position_, [&](Index n) {
      Index position = position_ - n;
      for (const Layer& layer : layers_) {
        const Index next = layer.attention.complete(position);
        if (!layer.attention.holds(position) || !layer.residual.hold(next)) return false;
        position = next;
      }
      return true;
    });
  }
  void rollback(Index n) {
    position_ -= n;
    ended_ = false;
    Index position = position_;
    for (Layer& layer : layers_) {
      layer.attention.rollback(layer.attention.position() - position);
      position = layer.attention.complete(position);
    }
  }

  void save(StateWriter& to) const {
    to.put(static_cast<std::int64_t>(position_));
    to.put(static_cast<std::int64_t>(ended_));
    for (const Layer& layer : layers_) {
      layer.attention.save(to);
      layer.residual.save(layer.attention.position(), to);
    }
  }
  void load(StateReader& from) {
    position_ = from.get_index(0, last_position);
    ended_ = from.get_index(0, 1) != 0;
    Index expected = position_;
    for (Layer& layer : layers_) {
      layer.attention.load(from);
      if (layer.attention.position() != expected || layer.attention.ended() != ended_)
        reject("state", "layers that fit together", "others");
      expected = layer.attention.answered();
      layer.residual.load({expected, layer.attention.position()}, from);
    }
  }

 private:
  std::vector<Layer> layers_;
  Index position_ = 0;
  bool ended_ = false;
};

}  // namespace local_mha::inline LOCAL_MHA_ABI::detail
