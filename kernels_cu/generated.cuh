// What cuflash/_program.py writes for a call's own mask and score function. As it stands here: for
// calls that have neither.
#pragma once
#include "leaves.cuh"

constexpr bool kHasTree = false;
DEVICE bool tree_sees(const Problem&, const Place&) { return true; }
DEVICE Sight tree_sees(const Problem&, const Region&) { return kAll; }

constexpr bool kHasScoreMod = false;
DEVICE float score_mod(const Problem&, float score, const Place&) { return score; }
DEVICE float score_mod_derivative(const Problem&, float, const Place&) { return 1.f; }
