// A service over stdin and stdout: a line asks, a line of JSON answers, until the input ends.
//
//     cpp_service [--bundle FOLDER] [--threads N] [--timeout SECONDS] [--repeat N] < lines
//
// A line is the query, then the pictures' files, with a tab between each two (so no name can have one). Answers come in
// the order of the lines, also from several threads: {"query", "boxes", "text", "problem", "ms"} or {"error"}. A PPM is
// read here and its pixels are given where they lie; other files are Python's to read. With --repeat each line is asked
// that often, and the answer has the milliseconds of each time, by the host's clock. Exit code 2: it cannot start.
#include <algorithm>
#include <cctype>
#include <chrono>
#include <climits>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iostream>
#include <iterator>
#include <mutex>
#include <thread>

#include "gemvg_edge.hpp"

namespace {
struct Settings {
    std::optional<std::filesystem::path> bundle;
    int threads = 1, repeat = 1;
    std::optional<double> timeout;
};

// The bytes of a file that is a PPM of 8 bits ("P6"), and where its pixels lie in them.
struct Ppm {
    std::string bytes;
    gemvg::View view;
};

std::optional<Ppm> read_ppm(const std::string& path) {
    std::ifstream file(path, std::ios::binary);
    if (file.get() != 'P' || file.get() != '6') return {};
    file.seekg(0);
    Ppm ppm{{std::istreambuf_iterator<char>(file), {}}, {}};
    std::size_t at = 2, numbers[3];
    for (std::size_t& number : numbers) {
        const auto byte = [&] { return at < ppm.bytes.size() ? (unsigned char)ppm.bytes[at] : 0; };
        while (std::isspace(byte()) || byte() == '#')
            if (byte() == '#')
                at = std::min(ppm.bytes.find('\n', at), ppm.bytes.size());
            else
                at++;
        number = 0;
        for (; std::isdigit(byte()) && number < INT_MAX / 16; at++) number = 10 * number + std::size_t(byte() - '0');
    }
    const auto [width, height, white] = numbers;
    at++;  // one blank
    if (white != 255 || at > ppm.bytes.size() || (ppm.bytes.size() - at) / 3 < width * height) return {};
    ppm.view = {nullptr, int(height), int(width)};
    ppm.view.stride = std::ptrdiff_t(width * 3);
    ppm.view.pixels = ppm.bytes.data() + at;
    return ppm;
}

std::string quoted(const std::string& text) {
    std::string json = "\"";
    for (const char c : text) {
        char escaped[8] = {c};
        if (c == '"' || c == '\\')
            std::snprintf(escaped, sizeof escaped, "\\%c", c);
        else if ((unsigned char)c < 0x20)
            std::snprintf(escaped, sizeof escaped, "\\u%04x", c);
        json += escaped;
    }
    return json + '"';
}

std::string number(double value) {
    char written[32];
    std::snprintf(written, sizeof written, "%.17g", value);  // all digits: a reader gets the same number
    return written;
}

std::string numbers(const std::vector<double>& values) {
    std::string json;
    for (const double value : values) json += (json.empty() ? "[" : ", ") + number(value);
    return json + "]";
}

std::string to_json(const gemvg::Grounding& answer) {
    std::string boxes;
    for (const gemvg::Box& box : answer) {
        boxes += boxes.empty() ? "{" : ", {";
        boxes += "\"image\": " + std::to_string(box.image);
        boxes += ", \"x1\": " + number(box.x1) + ", \"y1\": " + number(box.y1);
        boxes += ", \"x2\": " + number(box.x2) + ", \"y2\": " + number(box.y2);
        boxes += ", \"score\": " + (box.score ? number(*box.score) : "null") + "}";
    }
    return "{\"query\": " + quoted(answer.query) + ", \"boxes\": [" + boxes + "], \"text\": " + quoted(answer.text) +
           ", \"problem\": " + (answer.problem ? quoted(*answer.problem) : "null") +
           ", \"ms\": " + number(answer.timings.total_ms());
}

std::vector<std::string> split(const std::string& line) {
    std::vector<std::string> parts;
    for (std::size_t from = 0, to = 0; to != std::string::npos; from = to + 1) {
        to = line.find('\t', from);
        parts.push_back(line.substr(from, to - from));
    }
    return parts;
}

template <class Work>
std::vector<double> timed(int times, const Work& work) {
    std::vector<double> all;
    for (int k = 0; k < times; k++) {
        const auto since = std::chrono::steady_clock::now();
        work();
        all.push_back(std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - since).count());
    }
    return all;
}

std::string answer(const gemvg::Grounder& grounder, const std::string& line, const Settings& settings) {
    try {
        const std::vector<std::string> parts = split(line);
        std::vector<Ppm> read(parts.size());
        std::vector<gemvg::Image> images;
        for (std::size_t k = 1; k < parts.size(); k++) {
            std::optional<Ppm> ppm = read_ppm(parts[k]);
            if (!ppm) {
                images.push_back(std::filesystem::path(parts[k]));
                continue;
            }
            const std::ptrdiff_t at = static_cast<const char*>(ppm->view.pixels) - ppm->bytes.data();
            read[k] = std::move(*ppm);
            read[k].view.pixels = read[k].bytes.data() + at;
            images.push_back(read[k].view);
        }
        gemvg::LookOptions looking;
        gemvg::AskOptions asking;
        looking.timeout = asking.timeout = settings.timeout;
        if (settings.repeat == 1) return to_json(grounder.look(images, looking).ground(parts[0], asking)) + "}";
        std::optional<gemvg::Scene> scene;
        gemvg::Grounding found;
        const auto both = timed(settings.repeat, [&] {
            scene = grounder.look(images, looking);
            found = scene->ground(parts[0], asking);
        });
        const auto alone = timed(settings.repeat, [&] { found = scene->ground(parts[0], asking); });
        const std::string times = ", \"look_and_ground_ms\": " + numbers(both) + ", \"ground_ms\": " + numbers(alone);
        return to_json(found) + times + "}";
    } catch (const std::exception& error) {
        return "{\"error\": " + quoted(error.what()) + "}";
    }
}

// Threads take lines in turn and hand out their answers in the order of the lines.
void serve(const gemvg::Grounder& grounder, const Settings& settings) {
    std::mutex reading, writing;
    std::condition_variable written;
    std::size_t asked = 0, answered = 0;
    const auto work = [&] {
        for (;;) {
            std::string line;
            std::size_t place;
            {
                const std::lock_guard<std::mutex> lock(reading);
                if (!std::getline(std::cin, line)) return;
                place = asked++;
            }
            const std::string said = answer(grounder, line, settings);
            std::unique_lock<std::mutex> lock(writing);
            written.wait(lock, [&] { return answered == place; });
            std::cout << said << std::endl;
            answered++;
            written.notify_all();
        }
    };
    std::vector<std::thread> threads;
    for (int k = 0; k < settings.threads; k++) threads.emplace_back(work);
    for (std::thread& thread : threads) thread.join();
}

[[noreturn]] void refuse(const std::string& sentence) {
    std::cerr << "cpp_service: " << sentence << std::endl;
    std::exit(2);
}

double positive(const std::string& name, const char* text) {
    char* end;
    const double value = std::strtod(text, &end);
    if (*end || !(value > 0 && value <= 1e6)) refuse(name + "=" + text + "; give a number above 0, at most 1000000");
    return value;
}

Settings read_arguments(int count, char** words) {
    Settings settings;
    for (int k = 1; k < count; k += 2) {
        const std::string name = words[k];
        const char* const value = k + 1 < count ? words[k + 1] : "";
        if (name == "--bundle")
            settings.bundle = value;
        else if (name == "--timeout")
            settings.timeout = positive(name, value);
        else if (name == "--threads" || name == "--repeat")
            (name == "--threads" ? settings.threads : settings.repeat) = std::max(1, int(positive(name, value)));
        else
            refuse("usage: cpp_service [--bundle FOLDER] [--threads N] [--timeout SECONDS] [--repeat N]");
    }
    return settings;
}
}  // namespace

int main(int count, char** words) {
    const Settings settings = read_arguments(count, words);
    try {
        serve(settings.bundle ? gemvg::Grounder(*settings.bundle) : gemvg::Grounder(), settings);
    } catch (const gemvg::Error& error) {
        refuse(error.what());
    }
}
