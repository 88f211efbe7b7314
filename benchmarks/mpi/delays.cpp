// SPDX-License-Identifier: MIT
// In place of the calls of MPI that the library exchanges rows with. Each message has a second one
// with the time at which it was sent, so that it is seen when the latency has passed since then;
// all ranks are on one machine, which has one clock.
#include "delays.hpp"

// The C interface is all that is used.
#define OMPI_SKIP_MPICXX 1
#define MPICH_SKIP_MPICXX 1
#include <mpi.h>

#include <algorithm>
#include <chrono>
#include <list>

namespace measuring {
namespace {

struct Stamp {
  double sent = 0;
  MPI_Request request = MPI_REQUEST_NULL;
};

struct State {
  Delays delays;
  double last_call = -1;  // when the program last came back from MPI
  std::list<Stamp> sent;  // of the messages at hand
  std::list<Stamp> received;
};
State state;

constexpr int stamp_tag = 1000;

double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}
void pass_until(double time) {
  while (now() < time) {
  }
}

// What the rank has computed since the last call takes longer.
void slow_down() {
  if (state.delays.slower <= 0 || state.last_call < 0) return;
  const double at = now();
  pass_until(at + state.delays.slower * (at - state.last_call));
}
void come_back() { state.last_call = now(); }

// When the last of the messages at hand may be seen, all stamps of which are there.
double visible_at() {
  double last = 0;
  for (const Stamp& stamp : state.received)
    last = std::max(last, stamp.sent + state.delays.latency);
  return last;
}

}  // namespace

Delays set_delays(const Delays& delays) {
  const Delays before = state.delays;
  state = State();
  state.delays = delays;
  return before;
}

}  // namespace measuring

extern "C" {

int MPI_Isend(const void* from, int count, MPI_Datatype type, int to, int tag, MPI_Comm comm,
              MPI_Request* request) {
  using measuring::state;
  const int result = PMPI_Isend(from, count, type, to, tag, comm, request);
  if (state.delays.latency <= 0) return result;
  auto& stamp = state.sent.emplace_back();
  stamp.sent = measuring::now();
  PMPI_Isend(&stamp.sent, 1, MPI_DOUBLE, to, tag + measuring::stamp_tag, comm, &stamp.request);
  return result;
}

int MPI_Irecv(void* to, int count, MPI_Datatype type, int from, int tag, MPI_Comm comm,
              MPI_Request* request) {
  using measuring::state;
  const int result = PMPI_Irecv(to, count, type, from, tag, comm, request);
  if (state.delays.latency <= 0) return result;
  auto& stamp = state.received.emplace_back();
  PMPI_Irecv(&stamp.sent, 1, MPI_DOUBLE, from, tag + measuring::stamp_tag, comm, &stamp.request);
  return result;
}

// With a latency, nothing is seen as done before MPI_Waitall().
int MPI_Testall(int count, MPI_Request requests[], int* flag, MPI_Status statuses[]) {
  using measuring::state;
  measuring::slow_down();
  int result = MPI_SUCCESS;
  if (state.delays.latency > 0) {
    *flag = 0;
    int done = 0;
    for (int i = 0; i < count; ++i) PMPI_Request_get_status(requests[i], &done, MPI_STATUS_IGNORE);
  } else {
    result = PMPI_Testall(count, requests, flag, statuses);
  }
  measuring::come_back();
  return result;
}

int MPI_Waitall(int count, MPI_Request requests[], MPI_Status statuses[]) {
  using measuring::state;
  measuring::slow_down();
  const int result = PMPI_Waitall(count, requests, statuses);
  for (auto* stamps : {&state.sent, &state.received})
    for (measuring::Stamp& stamp : *stamps) PMPI_Wait(&stamp.request, MPI_STATUS_IGNORE);
  measuring::pass_until(measuring::visible_at());
  state.sent.clear();
  state.received.clear();
  measuring::come_back();
  return result;
}

}  // extern "C"
