// SPDX-License-Identifier: MIT
#error "local_mha.hpp must not include nlohmann_json: only io/ may"
