// SPDX-License-Identifier: MIT
/// \file
/// A Unix socket whose clients each send a line and are sent an answer.
#pragma once

#include <poll.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstddef>
#include <stdexcept>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>
#include <vector>

#include <local_mha/core/error.hpp>

#include "terminal.hpp"

namespace local_mha::examples {

/// Clients of a Unix socket, each in one of a number of places; where none is free, they wait. One
/// who leaves, or for half a minute neither sends what is awaited nor takes what is there, loses
/// the place.
class LineServer {
 public:
  /// A line that is longer is cut off there.
  static constexpr std::size_t longest_line = 65'536;

  /// \throws std::invalid_argument if the path is too long
  /// \throws std::runtime_error saying why nobody could connect there
  LineServer(const std::string& path, std::size_t places) : path_(path), clients_(places) {
    sockaddr_un address{};
    address.sun_family = AF_UNIX;
    constexpr std::size_t longest = sizeof address.sun_path - 1;
    if (path.empty() || path.size() > longest)
      reject("socket", "a path of 1 to " + std::to_string(longest) + " bytes", path.size());
    path.copy(address.sun_path, path.size());
    listener_ = ::socket(AF_UNIX, SOCK_STREAM, 0);
    const bool bound =
        listener_ != -1 &&
        ::bind(listener_, reinterpret_cast<const sockaddr*>(&address), sizeof address) == 0;
    if (bound && ::listen(listener_, 128) == 0) return;
    const int error = errno;
    if (bound) ::unlink(path.c_str());
    if (listener_ != -1) ::close(listener_);
    throw std::runtime_error(path +
                             ": cannot be listened on: " + std::generic_category().message(error) +
                             (error == EADDRINUSE ? "; remove it if no server uses it" : ""));
  }
  LineServer(const LineServer&) = delete;
  LineServer& operator=(const LineServer&) = delete;
  /// Hangs up on all, and removes the socket's file.
  ~LineServer() {
    for (Client& client : clients_) hang_up(client);
    ::close(listener_);
    ::unlink(path_.c_str());
  }

  /// Takes clients in, receives and sends.
  /// \param milliseconds to wait for something to do; less if a signal comes
  /// \return the places of clients whose line came now
  /// \throws std::system_error if the system cannot look at so many clients
  std::vector<std::size_t> exchange(int milliseconds) {
    std::vector<pollfd> polled;
    const auto free =
        std::ranges::find_if(clients_, [](const Client& client) { return client.socket == -1; });
    for (const Client& client : clients_) {
      const int events = client.asks ? POLLIN : client.answer.empty() ? 0 : POLLOUT;
      polled.push_back({client.socket, static_cast<short>(events), 0});
    }
    // Without a file for one more client, they wait until another leaves.
    const bool takes_in = free != clients_.end() && !std::exchange(no_more_files_, false);
    polled.push_back({takes_in ? listener_ : -1, POLLIN, 0});
    if (::poll(polled.data(), static_cast<nfds_t>(polled.size()), milliseconds) == -1 &&
        errno != EINTR)
      throw std::system_error(errno, std::generic_category(), "poll");

    std::vector<std::size_t> lines;
    for (std::size_t i = 0; i < clients_.size(); ++i) {
      Client& client = clients_[i];
      if (client.socket == -1) continue;
      if (!receive_or_send(client, polled[i].revents) || client.silent.seconds() > 30) {
        hang_up(client);
        ++gone_;
      } else if (client.ends && client.answer.empty()) {
        hang_up(client);
      } else if ((polled[i].revents & POLLIN) != 0 && !client.asks) {
        lines.push_back(i);
      }
    }
    if (polled.back().revents != 0) {
      *free = {};
      free->socket = ::accept(listener_, nullptr, nullptr);
      no_more_files_ = free->socket == -1 && (errno == EMFILE || errno == ENFILE);
    }
    return lines;
  }

  /// Whether a client is in this place.
  bool here(std::size_t place) const { return clients_[place].socket != -1; }
  /// What the client sent, without the line feed.
  const std::string& line(std::size_t place) const { return clients_[place].line; }
  /// Adds to what the client is sent.
  void answer(std::size_t place, std::string_view text) { clients_[place].answer += text; }
  /// Hangs up when all is sent.
  void end(std::size_t place) { clients_[place].ends = true; }
  /// How many left before they had it all, or were silent for too long.
  std::size_t gone() const { return gone_; }

 private:
  struct Client {
    int socket = -1;
    std::string line;
    std::size_t received = 0;
    std::string answer;  // what was not sent yet
    bool asks = true;    // until the line is there
    bool ends = false;
    Stopwatch silent;
  };

  static void hang_up(Client& client) {
    if (client.socket != -1) ::close(std::exchange(client.socket, -1));
  }

  // False if the client is gone.
  static bool receive_or_send(Client& client, short events) {
    if ((events & POLLIN) != 0) {
      char bytes[4096];
      const ssize_t got = ::recv(client.socket, bytes, sizeof bytes, MSG_DONTWAIT);
      if (got <= 0) return got < 0 && (errno == EINTR || errno == EAGAIN);
      const std::string_view text(bytes, static_cast<std::size_t>(got));
      const std::size_t end = text.find('\n');
      client.asks = end == std::string_view::npos;
      client.line += text.substr(0, std::min(end, longest_line - client.line.size()));
      client.received += text.size();
      if (client.received > 16 * longest_line) return false;
    } else if ((events & (POLLHUP | POLLERR)) != 0) {
      return false;
    } else if ((events & POLLOUT) != 0) {
      const ssize_t sent = ::send(client.socket, client.answer.data(), client.answer.size(),
                                  MSG_DONTWAIT | MSG_NOSIGNAL);
      if (sent < 0) return errno == EINTR || errno == EAGAIN;
      client.answer.erase(0, static_cast<std::size_t>(sent));
    } else if (client.asks || !client.answer.empty()) {
      return true;
    }
    client.silent = {};
    return true;
  }

  std::string path_;
  std::vector<Client> clients_;
  int listener_ = -1;
  bool no_more_files_ = false;
  std::size_t gone_ = 0;
};

}  // namespace local_mha::examples
