// SPDX-License-Identifier: MIT
/// \file
/// Four sensors of a heated house, and faults of them and of its heating.
///
/// They are made here because faults must be known to count which of them are found: of the long
/// series that are free, those at hand, such as scipy's electrocardiogram, do not say where they
/// are.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <iostream>
#include <string>
#include <utility>
#include <vector>

#include <local_mha/core/random.hpp>

#include "csv_file.hpp"

namespace local_mha::examples {

/// Rows `[begin, end)`.
using Stretch = std::pair<Index, Index>;

/// A table and its faults, in order.
struct FaultyTable {
  Table table;
  std::vector<Stretch> faults;
};

/// A row each quarter of an hour, from January on: the temperatures outside, of the water that
/// flows to the radiators and of the rooms, in degrees Celsius, and the heating's power in
/// kilowatts. The water is as warm as the weather asks for, and 8 degrees cooler at night.
/// \param first_fault rows before it have none; from there on there is one each two to four days
inline FaultyTable make_heating_plant(Index rows, Index first_fault, std::uint64_t seed) {
  constexpr double two_pi = 6.283185307179586;
  enum Sensor { outside, water, rooms, power };
  enum Fault { spike, stuck, drift, no_night, boiler_off, none };
  RandomSequence random(seed);
  FaultyTable made{{{"outside", "water", "rooms", "power"}, RowMatrix<float>(rows, 4)}, {}};
  std::array<double, 4> now{0, 40, 20, 8};
  std::array<float, 4> before{};
  double weather = 0;
  Fault fault = none;
  Index begin = 0;
  Index end = 0;
  Index next = first_fault + 100;
  Sensor faulty = outside;
  double size = 0;
  for (Index i = 0; i < rows; ++i) {
    if (i == next) {
      fault = static_cast<Fault>(static_cast<int>(5 * random.uniform()));
      const auto hours = [&](double least, double most) {
        return static_cast<Index>(4 * (least + (most - least) * random.uniform()));
      };
      begin = fault == no_night ? (i / 96 + 1) * 96 - 4 : i;  // an hour before midnight
      end = begin + (fault == spike        ? 2
                     : fault == stuck      ? hours(8, 16)
                     : fault == drift      ? hours(12, 20)
                     : fault == boiler_off ? hours(2, 4)
                                           : hours(5, 6));
      faulty = static_cast<Sensor>(static_cast<int>(4 * random.uniform()));
      size = random.uniform() < 0.5 ? -1 : 1;
      next = end + 192 + static_cast<Index>(192 * random.uniform());
      if (end <= rows) made.faults.emplace_back(begin, end);
    }
    const bool in_fault = i >= begin && i < end && end <= rows;
    const double day = static_cast<double>(i) / 96;
    const double hour = 24 * (day - std::floor(day));
    weather += 0.005 * -weather + 0.15 * random.normal();
    now[outside] = 10 - 10 * std::cos(two_pi * day / 365) - 4 * std::cos(two_pi * (hour - 3) / 24) +
                   weather + 0.1 * random.normal();
    const bool night = (hour >= 22 || hour < 5) && !(in_fault && fault == no_night);
    double wanted = 20 + 1.4 * std::max(0.0, 21 - now[outside]) - (night ? 8 : 0);
    if (in_fault && fault == boiler_off) wanted = now[rooms];
    now[water] += 0.3 * (std::max(wanted, now[rooms]) - now[water]) + 0.15 * random.normal();
    now[rooms] += 0.02 * (now[water] - now[rooms]) - 0.028 * (now[rooms] - now[outside]) +
                  (hour > 7 && hour < 21 ? 0.03 : 0) + 0.04 * random.normal();
    now[power] = std::max(0.0, 0.4 * (now[water] - now[rooms]) + 0.1 * random.normal());
    for (int sensor = 0; sensor < 4; ++sensor) {
      constexpr std::array<double, 4> scale{5, 8, 1.5, 3};
      const auto s = static_cast<std::size_t>(sensor);
      double value = now[s];
      if (in_fault && sensor == faulty) {
        if (fault == spike) value += size * scale[s];
        if (fault == drift)
          value +=
              size * scale[s] * static_cast<double>(i - begin) / static_cast<double>(end - begin);
        if (fault == stuck) value = static_cast<double>(before[s]);
      }
      made.table.rows(i, sensor) = before[s] = static_cast<float>(value);
    }
  }
  return made;
}

/// Says how many alarms are right, such as come in a fault or up to four hours after it, and how
/// many faults have one.
/// \param by what they rest on
inline void print_found(const std::string& by, const std::vector<Stretch>& alarms,
                        const std::vector<Stretch>& faults) {
  const auto fits = [](const Stretch& alarm, const Stretch& fault) {
    return alarm.first < fault.second + 16 && alarm.second > fault.first;
  };
  const auto right = std::ranges::count_if(alarms, [&](const Stretch& alarm) {
    return std::ranges::any_of(faults, [&](const Stretch& fault) { return fits(alarm, fault); });
  });
  const auto found = std::ranges::count_if(faults, [&](const Stretch& fault) {
    return std::ranges::any_of(alarms, [&](const Stretch& alarm) { return fits(alarm, fault); });
  });
  std::cout << "by " << by << ": " << right << " of " << alarms.size() << " alarms are right, "
            << found << " of " << faults.size() << " faults are found\n";
}

}  // namespace local_mha::examples
