// SPDX-License-Identifier: MIT
// What computes most of the tests of rounded operands: inline functions, which this object holds,
// too, because it takes their addresses.
#include "reference/operand_gradients.hpp"

#include <tuple>

namespace reference {

extern const std::tuple functions_of_operands{
    &operand,
    &turn_row,
    &operand_row,
    &attention_of_operands,
    &operand_inputs,
    &local_mha_of_operands,
    &linear_backward_of_operands,
    &feed_forward_backward_of_operands,
    &attention_backward_of_operands,
    &local_mha_backward_of_operands,
};

}  // namespace reference
