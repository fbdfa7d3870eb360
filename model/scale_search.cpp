// The search of model/scale_search.py: every candidate scale of every group.
//
// Shape letters: L groups side by side, E elements of a group.

#include <algorithm>
#include <cmath>
#include <cstdint>

namespace {

constexpr int L = 16;  // groups that are searched side by side, one to a lane
constexpr float RANGE = 7.500001f;  // a hair above 7.5, so that factor 1 rounds the largest weight up on every CPU

// (Σhwk)² / Σhk² is what a candidate's levels k take off Σhw²; the refitted scale is Σhwk / Σhk².
struct Best {
    float gain[L];
    float scale[L];

    void consider(const float* product, const float* energy) {
#pragma omp simd
        for (int l = 0; l < L; ++l) {
            const float fitted = product[l] / std::max(energy[l], 1e-30f);
            const float gained = product[l] * fitted;
            scale[l] = gained > gain[l] ? fitted : scale[l];
            gain[l] = gained > gain[l] ? gained : gain[l];
        }
    }
};

// `w_EL` and `h_EL` are the groups' weights and their inputs' energies, transposed.
template <bool WEIGHTED>
void search(const float* w_EL, const float* h_EL, int64_t elements, const float* factors, int64_t candidates,
            float* scales) {
    float reach[L] = {};
    for (int64_t e = 0; e < elements; ++e) {
#pragma omp simd
        for (int l = 0; l < L; ++l) reach[l] = std::max(reach[l], std::fabs(w_EL[e * L + l]));
    }
    Best best = {};
    for (int64_t c = 0; c < candidates; ++c) {
        float inverse[L], product[L] = {}, energy[L] = {}, mirrored_product[L] = {}, mirrored_energy[L] = {};
#pragma omp simd
        for (int l = 0; l < L; ++l) inverse[l] = reach[l] > 0 ? RANGE / (factors[c] * reach[l]) : 0;
        for (int64_t e = 0; e < elements; ++e) {
#pragma omp simd
            for (int l = 0; l < L; ++l) {
                const float w = w_EL[e * L + l];
                const float level = std::nearbyint(w * inverse[l]);
                const float k = std::min(std::max(level, -8.0f), 7.0f);
                const float m = std::min(std::max(level, -7.0f), 8.0f);  // of the negative scale, negated
                const float hk = WEIGHTED ? h_EL[e * L + l] * k : k, hm = WEIGHTED ? h_EL[e * L + l] * m : m;
                product[l] += w * hk;
                energy[l] += k * hk;
                mirrored_product[l] -= w * hm;
                mirrored_energy[l] += m * hm;
            }
        }
        best.consider(product, energy);
        best.consider(mirrored_product, mirrored_energy);
    }
    std::copy_n(best.scale, L, scales);
}

}  // namespace

// `weights` [rows, inputs], `energy` [inputs] or null, `factors` [candidates], `scales` [rows * inputs / group].
extern "C" void emerald_search_scales(const float* weights, const float* energy, const float* factors,
                                      int64_t candidates, int64_t rows, int64_t inputs, int64_t group, float* scales) {
    const int64_t groups = rows * inputs / group;
#pragma omp parallel
    {
        float* w_EL = new float[2 * L * group];
        float* h_EL = w_EL + L * group;
#pragma omp for
        for (int64_t first = 0; first < groups; first += L) {
            const int64_t count = std::min<int64_t>(L, groups - first);
            for (int64_t l = 0; l < L; ++l) {
                const int64_t start = (first + std::min(l, count - 1)) * group;
                for (int64_t e = 0; e < group; ++e) w_EL[e * L + l] = weights[start + e];
                for (int64_t e = 0; energy && e < group; ++e) h_EL[e * L + l] = energy[start % inputs + e];
            }
            float found[L];
            (energy ? search<true> : search<false>)(w_EL, h_EL, group, factors, candidates, found);
            std::copy_n(found, count, scales + first);
        }
        delete[] w_EL;
    }
}
