// One AdamW step in one pass over memory. Included once per instruction set; the loops are left to the compiler.
#pragma once
#include "table.h"
#include "vec.h"

namespace {

// Blocks [first, last), of `elements` numbers each. A block has its own step size and its own correction of the second
// moment, because it counts its own steps.
void adamw(const AdamwArgs& a, int64_t first, int64_t last) {
    float *__restrict values = a.values, *__restrict mean = a.mean, *__restrict square = a.square;
    const float *__restrict grad = a.grad, *__restrict size = a.size, *__restrict root = a.root;
    const auto update = [=](int64_t i, float step, float correction) LAMBDA {
        mean[i] += (grad[i] - mean[i]) * (1 - a.beta1);
        square[i] = square[i] * a.beta2 + grad[i] * grad[i] * (1 - a.beta2);
        values[i] = values[i] * a.keep - step * mean[i] / (__builtin_sqrtf(square[i]) * correction + a.eps);
    };
    if (a.elements == 1) {
        for (int64_t i = first; i < last; ++i) update(i, size[i], root[i]);
        return;
    }
    for (int64_t b = first; b < last; ++b) {
        for (int64_t i = b * a.elements; i < (b + 1) * a.elements; ++i) update(i, size[b], root[b]);
    }
}

}  // namespace
