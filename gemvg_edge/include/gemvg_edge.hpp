// gemvg_edge in C++17: ask several pictures a question and get boxes, within this process, by Python's own runtime.
//
//     gemvg::Grounder grounder;                              // the model that ships; or grounder("my-bundle")
//     gemvg::Scene scene = grounder.look({gemvg::View{left, 480, 640}, "right.png"});
//     for (const gemvg::Box& box : scene.ground("the mug")) use(box.image, box.x1, box.y1, box.x2, box.y2);
//
// Any thread may use any of these, and copies of them, which stand for the same. What goes wrong is a gemvg::Error
// whose text is a sentence. Python starts at the first use and stays until the process ends; its lock is never held
// while code of yours runs. Knows nothing of models: names and meanings are those of gemvg_edge in Python.
// docs/howto/cpp.md has more, gemvg_edge.h the same for C.
//
//     c++ $(python -m gemvg_edge.config --cflags) main.cpp $(python -m gemvg_edge.config --libs)
#pragma once

#if __cplusplus < 201703L
#error "gemvg_edge.hpp needs C++17: -std=c++17"
#endif

#include "gemvg_edge_python.hpp"

#include <cstddef>
#include <cstdint>
#include <exception>
#include <filesystem>
#include <functional>
#include <optional>
#include <string>
#include <utility>
#include <variant>
#include <vector>

namespace gemvg {

// Ends requests that were given it, from any thread.
class Cancel {
  public:
    Cancel() : event_(detail::inside([](const detail::Names& names) { return detail::keep(names.event()); })) {}
    void set() const {
        detail::inside([&](const auto&) { event().attr("set")(); });
    }
    bool is_set() const {
        return detail::inside([&](const auto&) { return event().attr("is_set")().template cast<bool>(); });
    }
    detail::py::handle event() const { return detail::held(event_, "Cancel"); }

  private:
    detail::Handle event_;
};

// In which order a pixel's bytes lie; grey16 are 16 bits in this machine's order, 65535 is white.
enum class Order { rgb, bgr, rgba, bgra, grey, grey16 };

// Pixels of the caller's, which are read where they lie. They have to stay until `look` is back, and not longer.
struct View {
    const void* pixels = nullptr;  // of the upper left corner
    int height = 0, width = 0;
    std::ptrdiff_t stride = 0;     // bytes from a row to the one below; 0: no gaps between rows
    Order order = Order::rgb;
};

using Image = std::variant<View, std::filesystem::path>;

struct Options {  // as in Grounder.open; what is left out is as there
    std::optional<std::string> engine;
    std::optional<int> threads;
    std::optional<std::int64_t> max_pixels;
    std::optional<std::int64_t> max_query_tokens, max_new_tokens;
    std::optional<std::int64_t> cache_bytes;
    bool check_hashes = true;
};

struct LookOptions {  // as in Grounder.look
    std::optional<double> timeout;  // seconds
    std::optional<Cancel> cancel;
    std::optional<std::int64_t> max_pixels;
    std::optional<double> keep;
    std::optional<std::string> pruning;
};

struct AskOptions {  // as in Scene.ground
    std::optional<double> timeout;  // seconds
    std::optional<Cancel> cancel;
    bool think = false, constrained = true;
    std::optional<std::int64_t> max_new_tokens;
    std::function<void(const std::string&)> on_text;  // an exception in it ends the question and comes out of `ground`
};

struct Box {
    int image = 0;  // from 0
    double x1 = 0, y1 = 0, x2 = 0, y2 = 0;  // pixels of the original picture
    std::optional<std::string> label;
    std::optional<double> score;
};

struct Timings {
    double preprocess_ms = 0, vision_ms = 0, image_prefill_ms = 0, query_prefill_ms = 0, decode_ms = 0;
    int image_tokens = 0, cached_tokens = 0, query_tokens = 0, answer_tokens = 0;
    double look_ms() const { return preprocess_ms + vision_ms + image_prefill_ms; }
    double answer_ms() const { return query_prefill_ms + decode_ms; }
    double total_ms() const { return look_ms() + answer_ms(); }
};

struct Picture {
    std::string name;
    int width = 0, height = 0;  // pixels, once it is upright
};

// An answer: iterates over its boxes. Holds nothing of Python's.
struct Grounding {
    std::vector<Box> boxes;
    std::string text, thinking;
    std::optional<std::string> problem;  // why boxes may be missing
    Timings timings;
    std::string query;
    std::vector<Picture> pictures;

    auto begin() const { return boxes.begin(); }
    auto end() const { return boxes.end(); }
    std::size_t size() const { return boxes.size(); }
    bool empty() const { return boxes.empty(); }
    const Box& operator[](std::size_t k) const { return boxes[k]; }
};

namespace detail {
// An array over the caller's memory. Orders that Python does not know are views with a step backwards, but for BGRA,
// which is none: numpy copies that.
inline py::object array(const Names& names, const View& view, const std::string& name) {
    const bool wide = view.order == Order::grey16, grey = wide || view.order == Order::grey;
    const bool alpha = view.order == Order::rgba || view.order == Order::bgra, back = view.order == Order::bgr;
    const py::ssize_t channels = grey ? 1 : alpha ? 4 : 3, bytes = wide ? 2 : 1, row = view.width * channels * bytes;
    const py::ssize_t stride = view.stride ? view.stride : row;
    if (!view.pixels) throw Error(name + " is a View of no pixels, its pointer is null; give the first row's");
    if (view.height < 1 || view.width < 1)
        throw Error(name + " is a View of height " + std::to_string(view.height) + " and width " +
                    std::to_string(view.width) + "; give both in pixels, from 1 on");
    if ((stride < 0 ? -stride : stride) < row)
        throw Error(name + " is a View whose rows have " + std::to_string(row) + " bytes and a stride of " +
                    std::to_string(stride) + "; give the bytes from a row to the next, or 0 where there is no gap");
    const auto* first = static_cast<const unsigned char*>(view.pixels) + (back ? 2 : 0);
    std::vector<py::ssize_t> shape{view.height, view.width}, strides{stride, channels * bytes};
    if (!grey) shape.push_back(channels), strides.push_back(back ? -1 : 1);
    const void* const start = first;
    const auto memory = py::memoryview::from_buffer(start, bytes, wide ? "H" : "B", shape, strides);
    py::object array = names.asarray(memory);
    return view.order == Order::bgra ? array.attr("take")(py::make_tuple(2, 1, 0, 3), 2) : array;
}

inline py::object image(const Names& names, const Image& image, std::size_t k) {
    const View* const view = std::get_if<View>(&image);
    if (view) return array(names, *view, "images[" + std::to_string(k) + "]");
    const std::string path = std::get<std::filesystem::path>(image).string();
    return py::reinterpret_steal<py::object>(PyUnicode_DecodeFSDefaultAndSize(path.data(), Py_ssize_t(path.size())));
}

inline Timings timings(py::handle from) {
    const auto ms = [&](const char* name) { return from.attr(name).cast<double>(); };
    const auto tokens = [&](const char* name) { return from.attr(name).cast<int>(); };
    return {ms("preprocess_ms"), ms("vision_ms"), ms("image_prefill_ms"), ms("query_prefill_ms"), ms("decode_ms"),
            tokens("image_tokens"), tokens("cached_tokens"), tokens("query_tokens"), tokens("answer_tokens")};
}

inline std::vector<Picture> pictures(py::handle from) {
    std::vector<Picture> found;
    for (const py::handle one : from.attr("pictures"))
        found.push_back({text(one.attr("name")), one.attr("width").cast<int>(), one.attr("height").cast<int>()});
    return found;
}

inline std::optional<std::string> text_if_any(const py::object& value) {
    return value.is_none() ? std::nullopt : std::optional<std::string>(text(value));
}

inline Box box(py::handle from) {
    const auto number = [&](const char* name) { return from.attr(name).cast<double>(); };
    const py::object score = from.attr("score");
    return {from.attr("image").cast<int>(), number("x1"), number("y1"), number("x2"), number("y2"),
            text_if_any(from.attr("label")),
            score.is_none() ? std::nullopt : std::optional<double>(score.cast<double>())};
}

inline Grounding grounding(py::handle from) {
    Grounding made;
    for (const py::handle one : from.attr("boxes")) made.boxes.push_back(box(one));
    made.text = text(from.attr("text")), made.thinking = text(from.attr("thinking"));
    made.problem = text_if_any(from.attr("problem"));
    made.timings = timings(from.attr("timings"));
    made.query = text(from.attr("query"));
    made.pictures = pictures(from);
    return made;
}

inline py::cpp_function writer(const AskOptions& options, std::exception_ptr& thrown) {
    return py::cpp_function([&](const py::object& piece) {
        const std::string written = text(piece);
        {
            const Released released;
            try {
                options.on_text(written);
            } catch (...) {
                thrown = std::current_exception();
            }
        }
        if (thrown) throw std::runtime_error("on_text");  // ends the question in Python
    });
}

// One question, or several as a list.
inline std::vector<Grounding> ask(
    const Handle& scene, const std::vector<std::string>& queries, bool listed, const AskOptions& options) {
    std::exception_ptr thrown;
    try {
        return inside([&](const Names&) {
            py::list asked;
            for (const std::string& query : queries) asked.append(utf8(query, "query"));
            py::dict named;
            named["think"] = options.think, named["constrained"] = options.constrained;
            give(named, "timeout", options.timeout);
            give(named, "max_new_tokens", options.max_new_tokens);
            if (options.cancel) named["cancel"] = options.cancel->event();
            if (options.on_text) named["on_text"] = writer(options, thrown);
            const py::object ground = held(scene, "Scene").attr("ground");
            std::vector<Grounding> answers;
            if (!listed) return answers.push_back(grounding(ground(asked[0], **named))), answers;
            for (const py::handle one : ground(asked, **named)) answers.push_back(grounding(one));
            return answers;
        });
    } catch (const Error&) {
        if (thrown) std::rethrow_exception(thrown);
        throw;
    }
}
}  // namespace detail

// Pictures that were looked at, ready for questions.
class Scene {
  public:
    Grounding ground(const std::string& query, const AskOptions& options = {}) const {
        return std::move(detail::ask(scene_, {query}, false, options).front());
    }

    // Several questions, which some engines answer faster together.
    std::vector<Grounding> ground_each(const std::vector<std::string>& queries, const AskOptions& options = {}) const {
        return detail::ask(scene_, queries, true, options);
    }

    // A box of one of the pictures as a query shows it.
    std::string mark(const Box& box) const {
        return detail::inside([&](const detail::Names& names) {
            return detail::text(scene().attr("mark")(names.box(box.image, box.x1, box.y1, box.x2, box.y2)));
        });
    }

    // What about the pictures is unlike those of the model's training, where boxes may mean nothing.
    std::optional<std::string> warning() const {
        return detail::inside([&](const auto&) { return detail::text_if_any(scene().attr("warning")); });
    }

    std::vector<Picture> pictures() const {
        return detail::inside([&](const auto&) { return detail::pictures(scene()); });
    }

    Timings timings() const {
        return detail::inside([&](const auto&) { return detail::timings(scene().attr("timings")); });
    }

  private:
    friend class Grounder;
    explicit Scene(detail::Handle scene) : scene_(std::move(scene)) {}
    detail::py::handle scene() const { return detail::held(scene_, "Scene"); }

    detail::Handle scene_;
};

// A model that was opened. Copies are the same one; its memory goes with the last of them and of their scenes.
class Grounder {
  public:
    explicit Grounder(const Options& options = {}) : grounder_(open(nullptr, options)) {}
    explicit Grounder(const std::filesystem::path& bundle, const Options& options = {})
        : grounder_(open(&bundle, options)) {}

    Scene look(const std::vector<Image>& images, const LookOptions& options = {}) const {
        return detail::inside([&](const detail::Names& names) {
            detail::py::list given;
            for (std::size_t k = 0; k < images.size(); k++) given.append(detail::image(names, images[k], k));
            detail::py::dict named;
            detail::give(named, "timeout", options.timeout);
            if (options.cancel) named["cancel"] = options.cancel->event();
            detail::give(named, "max_pixels", options.max_pixels);
            detail::give(named, "keep", options.keep);
            detail::give(named, "pruning", options.pruning);
            return Scene(detail::keep(grounder().attr("look")(given, **named)));
        });
    }

    // Lets the model's memory go at once; later questions are an Error. Twice is none.
    void close() const {
        detail::inside([&](const auto&) { grounder().attr("close")(); });
    }

    // What the bundle calls itself.
    std::string name() const {
        return detail::inside([&](const auto&) { return detail::text(grounder().attr("manifest").attr("name")); });
    }

  private:
    static detail::Handle open(const std::filesystem::path* bundle, const Options& options) {
        return detail::inside([&](const detail::Names& names) {
            detail::py::dict named;
            if (bundle) named["bundle"] = detail::image(names, *bundle, 0);
            detail::give(named, "engine", options.engine);
            detail::give(named, "threads", options.threads);
            detail::give(named, "max_pixels", options.max_pixels);
            detail::give(named, "max_query_tokens", options.max_query_tokens);
            detail::give(named, "max_new_tokens", options.max_new_tokens);
            detail::give(named, "cache_bytes", options.cache_bytes);
            named["check_hashes"] = options.check_hashes;
            return detail::keep(names.grounder.attr("open")(**named));
        });
    }
    detail::py::handle grounder() const { return detail::held(grounder_, "Grounder"); }

    detail::Handle grounder_;
};

}  // namespace gemvg
