// Which of many numbers have changed: what would run over all of a context's cells for every token looks at these alone.
#pragma once

#include <cstdint>
#include <vector>

class llama_kvtc_changes {
public:
    static constexpr uint32_t MOST = 1024; // that are remembered; 4 KiB

    void add(uint32_t i) {
        if (latest.empty()) {
            latest.resize(MOST);
        }
        latest[n++ % MOST] = i;
    }

    void add_all() { n += MOST + 1; }

    // a moment, for those that come after it
    uint64_t now() const { return n; }

    // f(i) for each change after a moment, some more than once. False, and nothing is done, if there were too many
    template <typename F>
    bool for_each_since(uint64_t moment, F && f) const {
        if (n - moment > MOST) {
            return false;
        }
        for (; moment < n; ++moment) {
            f(latest[moment % MOST]);
        }
        return true;
    }

private:
    std::vector<uint32_t> latest;
    uint64_t n = 0;
};
