// SPDX-License-Identifier: MIT
/// \file
/// Training on one process, or by all ranks of MPI: those that hold a sequence together, and groups
/// of them that share a batch.
#pragma once

#include <algorithm>
#include <cstdint>
#include <iostream>
#include <optional>
#include <streambuf>
#include <string>
#include <utility>

#include <local_mha/local_mha.hpp>
#if defined(LOCAL_MHA_EXAMPLE_MPI)
#include <local_mha/mpi.hpp>
#endif

namespace local_mha::examples {

#if defined(LOCAL_MHA_EXAMPLE_MPI)

/// MPI, from the first to the last line of a program. Of its ranks, the first alone speaks, and
/// writes files.
class MpiProgram {
 public:
  MpiProgram(int& argc, char**& argv) {
    int provided = 0;
    MPI_Init_thread(&argc, &argv, MPI_THREAD_FUNNELED, &provided);
    int rank = 0;
    MPI_Comm_rank(MPI_COMM_WORLD, &rank);
    if (rank == 0) return;
    std::cout.rdbuf(&silent_);
    std::cerr.rdbuf(&silent_);
  }
  MpiProgram(const MpiProgram&) = delete;
  MpiProgram& operator=(const MpiProgram&) = delete;
  ~MpiProgram() { MPI_Finalize(); }

 private:
  struct Silent : std::streambuf {
    int_type overflow(int_type c) override { return traits_type::not_eof(c); }
    std::streamsize xsputn(const char*, std::streamsize size) override { return size; }
  };
  // Streams are flushed when the program ends.
  inline static Silent silent_;
};

/// The ranks of a training. Everything is collective.
class Ranks {
 public:
  /// \param of_sequence ranks that hold a sequence together; 0: all
  /// \throws std::invalid_argument, on every rank, unless groups of so many ranks share the batch
  Ranks(Index of_sequence, Index batch) {
    int size = 1;
    MPI_Comm_size(MPI_COMM_WORLD, &size);
    const Index together = of_sequence == 0 ? size : of_sequence;
    if (together < 1 || size % together != 0)
      reject("--ranks-per-sequence", "a number that divides the ranks, " + std::to_string(size),
             of_sequence);
    groups_ = size / together;
    if (batch % groups_ != 0)
      reject("--batch", "a multiple of the groups of ranks, " + std::to_string(groups_), batch);
    if (size == 1) return;
    const mpi::Communicator& world = world_.emplace();
    group_ = world.rank() / together;
    make_part(group_, sequence_);
    make_part(world.rank() % together, across_);
  }

  bool first() const { return !world_ || world_->rank() == 0; }
  Index number() const { return world_ ? world_->size() : 1; }

  /// Whether one of the ranks says so.
  bool any(bool some) const {
    if (!world_) return some;
    int number = some ? 1 : 0;
    MPI_Allreduce(MPI_IN_PLACE, &number, 1, MPI_INT, MPI_MAX, world_->get());
    return number != 0;
  }
  /// Calls `task()`. What it throws on one rank ends all, with the message.
  template <typename Task>
  decltype(auto) together(Task&& task) const {
    return world_ ? world_->alone(std::forward<Task>(task)) : std::forward<Task>(task)();
  }

  /// LocalTransformer::backward(), of tokens that every rank has.
  template <typename Scalar, typename Arithmetic>
  Scalar backward(const LocalTransformer<Scalar, Arithmetic, Arithmetic>& model,
                  LocalTransformerParameters<Scalar>& gradients,
                  TensorView<const std::int64_t, 2> tokens, const EncoderCall& call) const {
    if (!world_) return model.backward(gradients, tokens, call);
    const Index batch = tokens.dimension(0) / groups_, seqlen = tokens.dimension(1) - 1;
    const mpi::Split split = split_of(seqlen);
    const auto take = [&](Index ahead) {
      return own_of(tokens, group_ * batch, batch, split.stretch().begin + ahead, split.rows());
    };
    EncoderCall own = call;
    // Groups drop something else.
    if (own.training && groups_ > 1)
      own.training = own.training->of_part(static_cast<std::uint64_t>(group_));
    const mpi::LocalTransformer<Scalar, Arithmetic, Arithmetic> over_ranks(*sequence_, model);
    if (groups_ == 1) return over_ranks.backward(gradients, take(0), take(1), split, own);

    auto of_group = LocalTransformerParameters<Scalar>::zeros(model.config());
    Scalar loss = over_ranks.backward(of_group, take(0), take(1), split, own);
    // The mean over the batch is that of the groups' means.
    const Scalar share = Scalar(1) / static_cast<Scalar>(groups_);
    for_each_parameter(of_group, [&](const std::string&, auto& tensor) {
      for (Index i = 0; i < tensor.size(); ++i) tensor.data()[i] *= share;
    });
    mpi::add_over_ranks(*across_, of_group, gradients);
    return share * mpi::sum_over_ranks(*across_, loss);
  }

  /// LocalTransformer::loss(), of input and labels that every rank has.
  template <typename Scalar, typename Arithmetic>
  Scalar loss(const LocalTransformer<Scalar, Arithmetic, Arithmetic>& model,
              TensorView<const std::int64_t, 2> input, TensorView<const std::int64_t, 2> labels,
              const EncoderCall& call) const {
    if (!world_) return model.loss(input, labels, call);
    const mpi::Split split = split_of(input.dimension(1));
    const auto take = [&](const TensorView<const std::int64_t, 2>& of) {
      return own_of(of, 0, of.dimension(0), split.stretch().begin, split.rows());
    };
    return mpi::LocalTransformer<Scalar, Arithmetic, Arithmetic>(*sequence_, model)
        .loss(take(input), take(labels), split, call);
  }

 private:
  // Of those ranks of the world that name the same color.
  void make_part(Index color, std::optional<mpi::Communicator>& part) {
    MPI_Comm some = MPI_COMM_NULL;
    MPI_Comm_split(world_->get(), static_cast<int>(color), world_->rank(), &some);
    part.emplace(some);
    MPI_Comm_free(&some);
  }

  // Where there are enough positions, stretches begin where tiles do.
  mpi::Split split_of(Index seqlen) const {
    constexpr Index block = local_mha::block_rows<float>;
    return mpi::Split::even(*sequence_, seqlen, seqlen >= block * sequence_->size() ? block : 1);
  }

  static Tensor<std::int64_t, 2> own_of(const TensorView<const std::int64_t, 2>& of, Index first,
                                        Index batch, Index begin, Index rows) {
    Tensor<std::int64_t, 2> own(batch, rows);
    for (Index b = 0; b < batch; ++b)
      std::copy_n(of.data() + (first + b) * of.dimension(1) + begin, rows, own.data() + b * rows);
    return own;
  }

  std::optional<mpi::Communicator> world_;  // if there are several
  Index groups_ = 1;
  Index group_ = 0;
  std::optional<mpi::Communicator> sequence_;  // ranks that hold the same sequences
  std::optional<mpi::Communicator> across_;    // one of each group, with the same rows
};

#else

struct MpiProgram {
  MpiProgram(int&, char**&) {}
};

/// One process.
class Ranks {
 public:
  Ranks(Index of_sequence, Index) {
    if (of_sequence > 1)
      reject("--ranks-per-sequence", "1, because the program was built without MPI", of_sequence);
  }

  bool first() const { return true; }
  Index number() const { return 1; }
  bool any(bool some) const { return some; }
  template <typename Task>
  decltype(auto) together(Task&& task) const {
    return std::forward<Task>(task)();
  }
  template <typename Scalar, typename Arithmetic>
  Scalar backward(const LocalTransformer<Scalar, Arithmetic, Arithmetic>& model,
                  LocalTransformerParameters<Scalar>& gradients,
                  TensorView<const std::int64_t, 2> tokens, const EncoderCall& call) const {
    return model.backward(gradients, tokens, call);
  }
  template <typename Scalar, typename Arithmetic>
  Scalar loss(const LocalTransformer<Scalar, Arithmetic, Arithmetic>& model,
              TensorView<const std::int64_t, 2> input, TensorView<const std::int64_t, 2> labels,
              const EncoderCall& call) const {
    return model.loss(input, labels, call);
  }
};

#endif

}  // namespace local_mha::examples
