// What a C++ host may do to gemvg_edge.hpp, one case a process: test_cpp_host.py starts them and reads what they print.
//
//   cpp_host CASE [PIXELS WIDTH HEIGHT]      PIXELS is a file of RGB
#include <sys/wait.h>

#include <chrono>
#include <clocale>
#include <csignal>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <iterator>
#include <thread>

#include "gemvg_edge.hpp"

namespace py = pybind11;
using Bytes = std::vector<unsigned char>;

static const char* QUERY = "all balls";
static Bytes rgb;
static int width, height;

static void print(const char* name, const gemvg::Grounding& answer) {
    std::printf("%s", name);
    for (const gemvg::Box& box : answer) {
        std::printf(" %d %.17g %.17g %.17g %.17g", box.image, box.x1, box.y1, box.x2, box.y2);
        std::printf(" %.17g", box.score.value_or(-1));
    }
    std::printf("\n");
}

template <class Raised = gemvg::Error, class Work>
static void refused(const char* name, const Work& work) {
    try {
        work();
    } catch (const Raised& error) {
        std::printf("%s: %s\n", name, error.what());
        return;
    } catch (const std::exception& error) {
        std::printf("%s: ANOTHER KIND: %s\n", name, error.what());
        return;
    }
    std::printf("%s: NOT REFUSED\n", name);
}

static gemvg::View packed() { return {rgb.data(), height, width}; }

// The picture's pixels once more, in rows of `stride` bytes, each pixel as `order` has it.
static Bytes laid_out(gemvg::Order order, int channels, int stride, bool upwards) {
    Bytes bytes(std::size_t(stride) * height, 0xab);
    for (int y = 0; y < height; y++)
        for (int x = 0; x < width; x++) {
            const unsigned char* from = &rgb[3 * (std::size_t(y) * width + x)];
            unsigned char* to = &bytes[std::size_t(upwards ? height - 1 - y : y) * stride + x * channels];
            const bool back = order == gemvg::Order::bgr || order == gemvg::Order::bgra;
            if (order == gemvg::Order::grey)
                to[0] = from[1];
            else if (order == gemvg::Order::grey16)
                to[0] = to[1] = from[1];
            else
                to[0] = from[back ? 2 : 0], to[1] = from[1], to[2] = from[back ? 0 : 2];
            if (channels == 4) to[3] = 255;
        }
    return bytes;
}

// Every layout beside a packed one in the same look; the memory is overwritten before anything is asked.
static void views() {
    using gemvg::Order;
    gemvg::Options options;
    options.cache_bytes = 0;  // or the first look would answer for all
    const gemvg::Grounder grounder(options);
    const struct {
        const char* name;
        Order order;
        int channels, gap;
        bool upwards;
    } layouts[] = {{"rgb", Order::rgb, 3, 0, false},      {"gaps", Order::rgb, 3, 5, false},
                   {"bgr", Order::bgr, 3, 0, false},      {"bgr_gaps_upwards", Order::bgr, 3, 1, true},
                   {"rgba", Order::rgba, 4, 0, false},    {"bgra_gaps", Order::bgra, 4, 8, false},
                   {"upwards", Order::rgb, 3, 0, true},   {"grey", Order::grey, 1, 0, false},
                   {"grey_gaps", Order::grey, 1, 3, false}, {"grey16", Order::grey16, 2, 0, false}};
    for (const auto& layout : layouts) {
        const int stride = width * layout.channels + layout.gap;
        Bytes bytes = laid_out(layout.order, layout.channels, stride, layout.upwards), second = rgb;
        const std::size_t last = std::size_t(stride) * (height - 1);
        gemvg::View view{bytes.data(), height, width, 0, layout.order};
        if (layout.gap) view.stride = stride;
        if (layout.upwards) view.pixels = bytes.data() + last, view.stride = -stride;
        const gemvg::Scene scene = grounder.look({view, gemvg::View{second.data(), height, width}});
        std::memset(bytes.data(), 0x55, bytes.size());
        std::memset(second.data(), 0x55, second.size());
        print(layout.name, scene.ground(QUERY));
    }
}

static void errors() {
    const gemvg::Grounder grounder;
    const gemvg::Scene scene = grounder.look({packed()});
    gemvg::AskOptions soon;
    soon.timeout = 1e-9;
    refused<gemvg::TimedOut>("timeout", [&] { scene.ground(QUERY, soon); });
    soon.timeout = -1;
    refused("negative", [&] { scene.ground(QUERY, soon); });
    gemvg::LookOptions looking;
    looking.timeout = 1e-9;
    refused<gemvg::TimedOut>("look_timeout", [&] { grounder.look({packed()}, looking); });
    looking = {};
    looking.max_pixels = 3;
    refused("max_pixels", [&] { grounder.look({packed()}, looking); });
    gemvg::AskOptions called_off;
    called_off.cancel.emplace().set();
    refused<gemvg::Cancelled>("cancel", [&] { scene.ground(QUERY, called_off); });
    refused("bundle", [] { gemvg::Grounder("/nope"); });
    refused("none", [&] { grounder.look({}); });
    refused("null", [&] { grounder.look({packed(), gemvg::View{nullptr, 5, 5}}); });
    refused("empty", [&] { grounder.look({gemvg::View{rgb.data(), 0, 5}}); });
    refused("stride", [&] { grounder.look({gemvg::View{rgb.data(), 5, 5, 14}}); });
    refused("missing", [&] { grounder.look({"/nope.png"}); });
    refused("utf8", [&] { scene.ground("\xff"); });
    refused("mark", [&] { scene.mark({7, 0, 0, 1, 1, {}, {}}); });
    refused("python", [] { gemvg::detail::inside([](const auto&) { py::module_::import("no_such_module"); }); });
    refused("late", [] { gemvg::use_python("/usr/bin/python3"); });
    gemvg::Scene moved = scene;
    const gemvg::Scene here = std::move(moved);
    refused("moved", [&] { moved.ground(QUERY); });
    print("still", here.ground(QUERY));
    grounder.close();
    refused("closed", [&] { scene.ground(QUERY); });
}

// One after the other, each the first of its memory.
static void again() {
    for (int k = 0; k < 3; k++) {
        std::optional<gemvg::Grounder> grounder(std::in_place);
        const gemvg::Scene scene = grounder->look({packed()});
        grounder.reset();  // a scene keeps what it needs
        print("again", scene.ground(QUERY));
    }
    const gemvg::Scene scene = gemvg::Grounder().look({packed()});
    const gemvg::Grounding answer = scene.ground(QUERY);
    print("marked", scene.ground("the same object as " + scene.mark(answer[0])));
    for (const gemvg::Grounding& one : scene.ground_each({QUERY, "the plate"})) print("each", one);
    std::printf("pictures %s %d %d %d\n", scene.pictures()[0].name.c_str(), scene.pictures()[0].width,
                answer.pictures[0].height, int(scene.timings().image_tokens == answer.timings.image_tokens));
    gemvg::AskOptions few;
    few.max_new_tokens = 5;
    std::printf("few %s\n", scene.ground(QUERY, few).problem.value_or("none").c_str());
    std::printf("usual %s\n", scene.warning().value_or("nothing").c_str());
    const gemvg::Scene many = gemvg::Grounder().look({packed(), packed(), packed(), packed(), packed()});
    std::printf("unlike %s\n", many.warning().value_or("nothing").c_str());
}

// The callback is the host's own code: another thread gets at Python while it runs, and its exceptions come out.
static void callback() {
    const gemvg::Scene scene = gemvg::Grounder().look({packed()});
    std::string written;
    gemvg::AskOptions options;
    options.on_text = [&](const std::string& piece) { written += piece; };
    std::printf("text %d\n", int(scene.ground(QUERY, options).text == written));
    const gemvg::Cancel cancel;
    options.cancel = cancel;
    options.on_text = [&](const std::string&) { std::thread([&] { cancel.set(); }).join(); };
    refused<gemvg::Cancelled>("cancelled", [&] { scene.ground(QUERY, options); });
    options.cancel.reset();
    options.on_text = [](const std::string&) { throw std::logic_error("the host's own"); };
    refused<std::logic_error>("thrown", [&] { scene.ground(QUERY, options); });
    print("still", scene.ground(QUERY));
}

// The first use is in four threads at once; later, others get Python's lock while an engine works.
static void threads() {
    std::vector<gemvg::Grounding> answers(4);
    std::vector<std::thread> all;
    for (gemvg::Grounding& answer : answers)
        all.emplace_back([&] {
            gemvg::Options options;
            options.threads = 1;
            const gemvg::Grounder grounder(options), copy = grounder;
            for (int k = 0; k < 5; k++) answer = copy.look({packed()}).ground(QUERY);
        });
    for (std::thread& thread : all) thread.join();
    for (const gemvg::Grounding& answer : answers) print("thread", answer);
    for (const char* engine : {"native", "onnx"}) {
        gemvg::Options options;
        options.engine = engine;
        options.threads = 1;
        gemvg::LookOptions large;
        large.max_pixels = 1 << 20;
        std::atomic<bool> done{false};
        const gemvg::Cancel cancel;
        try {
            const gemvg::Grounder grounder(options);
            std::thread looking([&] { grounder.look({packed()}, large), done = true; });
            int calls = 0;
            for (; !done; calls++) cancel.is_set(), std::this_thread::sleep_for(std::chrono::microseconds(200));
            looking.join();
            std::printf("%s %s\n", engine, calls > 20 ? "lets others go on" : "HOLDS THE LOCK");
        } catch (const gemvg::Error& error) {
            std::printf("%s %s\n", engine, error.what());
        }
    }
}

// The process ends while threads ask, a global Grounder lives, and Python has not written all that it printed.
static std::optional<gemvg::Grounder> global;

static void ending() {
    global.emplace();
    for (int k = 0; k < 3; k++)
        std::thread([] {
            const gemvg::Grounder grounder = *global;
            const gemvg::Scene scene = grounder.look({packed()});
            for (;;) scene.ground(QUERY);
        }).detach();
    std::this_thread::sleep_for(std::chrono::milliseconds(150));
    gemvg::detail::inside([](const auto&) { py::print("printed by Python"); });
}

// Python's start leaves signals, locale and standard streams as they were.
static void manners() {
    const auto handlers = [] {
        std::vector<void (*)(int)> all;
        for (int number = 1; number < 32; number++) {
            struct sigaction now;
            all.push_back(sigaction(number, nullptr, &now) ? nullptr : now.sa_handler);
        }
        return all;
    };
    const auto before = handlers();
    const gemvg::Grounder grounder;
    print("asked", grounder.look({packed()}).ground(QUERY));
    std::printf("signals %d\n", int(handlers() == before));
    std::printf("locale %s\n", std::setlocale(LC_ALL, nullptr));
    std::fflush(stdout);
    if (const pid_t child = fork()) {
        int status;
        waitpid(child, &status, 0);
        std::printf("child %d\n", status);
    } else {
        refused("forked", [&] { grounder.name(); });
        std::exit(0);
    }
    print("parent", grounder.look({packed()}).ground(QUERY));
}

// The host has a Python of its own, which it ends before the last Grounder goes.
static void guest() {
    wchar_t program[4096];
    std::mbstowcs(program, gemvg::detail::built_for().c_str(), 4096);
    PyConfig config;
    PyConfig_InitPythonConfig(&config);
    PyConfig_SetString(&config, &config.program_name, program);
    py::scoped_interpreter interpreter(&config);
    global.emplace();  // with the lock held
    {
        py::gil_scoped_release released;
        std::thread([] { print("guest", global->look({packed()}).ground(QUERY)); }).join();
    }
    py::print("the host's Python goes on", py::arg("flush") = true);
}

#ifdef DOCUMENTED  // the program of docs/howto/cpp.md, whose main has another name here
#include DOCUMENTED
#else
static int documented() { return 1; }
#endif

int main(int count, char** words) {
    if (count == 2) return documented();
    if (count == 5) {
        std::ifstream file(words[2], std::ios::binary);
        rgb.assign(std::istreambuf_iterator<char>(file), {});
        width = std::atoi(words[3]), height = std::atoi(words[4]);
    }
    const struct {
        const char* name;
        void (*run)();
    } cases[] = {{"views", views},       {"errors", errors}, {"again", again},     {"callback", callback},
                 {"threads", threads}, {"ending", ending}, {"manners", manners}, {"guest", guest}};
    for (const auto& one : cases)
        if (std::string(words[1]) == one.name) return one.run(), 0;
    return 1;
}
