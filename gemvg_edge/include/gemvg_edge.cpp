// gemvg_edge.h over gemvg_edge.hpp: handles are C++ objects, exceptions become a status and a sentence of the thread's.
#include "gemvg_edge.h"

#include "gemvg_edge.hpp"

#include <cmath>
#include <cstring>
#include <memory>

struct gemvg_grounder {
    gemvg::Grounder grounder;
};
struct gemvg_scene {
    gemvg::Scene scene;
};
struct gemvg_cancel {
    gemvg::Cancel cancel;
};
struct gemvg_grounding {
    gemvg::Grounding answer;
    std::vector<gemvg_box> boxes;
};

namespace {
thread_local std::string said;

gemvg_status fail(gemvg_status status, const char* sentence) noexcept {
    try {
        said = sentence;
    } catch (...) {  // no memory for it: what is left of an earlier one would mislead
        said.clear();
    }
    return status;
}

template <class Action>
gemvg_status trying(const Action& action) noexcept {
    try {
        action();
        return GEMVG_OK;
    } catch (const gemvg::TimedOut& error) {
        return fail(GEMVG_TIMED_OUT, error.what());
    } catch (const gemvg::Cancelled& error) {
        return fail(GEMVG_CANCELLED, error.what());
    } catch (const std::bad_alloc&) {
        return fail(GEMVG_FAILED, "there is not enough memory");
    } catch (const std::exception& error) {
        return fail(GEMVG_FAILED, error.what());
    } catch (...) {
        return fail(GEMVG_FAILED, "an exception of a kind that is not known");
    }
}

// `made` of a call, set to null before anything can fail.
template <class Made, class Make>
gemvg_status making(Made** made, const Make& make) noexcept {
    if (!made) return fail(GEMVG_FAILED, "the place for the result is NULL; give a pointer's address");
    *made = nullptr;
    return trying([&] { *made = make(); });
}

template <class Handle>
const Handle& given(const Handle* handle, const char* name) {
    if (!handle) throw gemvg::Error(std::string(name) + " is NULL; give one that was made");
    return *handle;
}

template <class Value>
std::optional<Value> unless_zero(Value value) {
    return value == 0 ? std::nullopt : std::optional<Value>(value);
}

std::optional<std::string> unless_null(const char* text) {
    return text ? std::optional<std::string>(text) : std::nullopt;
}

std::optional<gemvg::Cancel> cancel_of(const gemvg_cancel* cancel) {
    return cancel ? std::optional<gemvg::Cancel>(cancel->cancel) : std::nullopt;
}

gemvg::Image image_of(const gemvg_image& image, size_t k) {
    if (image.path) return std::filesystem::path(image.path);
    if (image.order < GEMVG_RGB || image.order > GEMVG_GREY16)
        throw gemvg::Error("images[" + std::to_string(k) + "] has an order of " + std::to_string(int(image.order)) +
                           ", which none is; give GEMVG_RGB or another of gemvg_order");
    return gemvg::View{image.pixels, image.height, image.width, image.stride, gemvg::Order(image.order)};
}

gemvg_grounding* grounding_of(gemvg::Grounding answer) {
    auto made = std::make_unique<gemvg_grounding>();
    made->answer = std::move(answer);
    for (const gemvg::Box& box : made->answer)
        made->boxes.push_back({box.image, box.x1, box.y1, box.x2, box.y2, box.score.value_or(NAN),
                               box.label ? box.label->c_str() : nullptr});
    return made.release();
}
}  // namespace

const char* gemvg_error(void) { return said.c_str(); }

gemvg_status gemvg_use_python(const char* program) {
    return trying([&] { gemvg::use_python(&given(program, "program")); });
}

gemvg_status gemvg_open(const char* bundle, const gemvg_options* options, gemvg_grounder** grounder) {
    return making(grounder, [&] {
        const gemvg_options all = options ? *options : gemvg_options{};
        gemvg::Options taken;
        taken.engine = unless_null(all.engine), taken.threads = unless_zero(all.threads);
        taken.max_pixels = unless_zero(all.max_pixels), taken.max_query_tokens = unless_zero(all.max_query_tokens);
        taken.max_new_tokens = unless_zero(all.max_new_tokens);
        taken.cache_bytes = all.cache_bytes < 0 ? 0 : unless_zero(all.cache_bytes);
        return new gemvg_grounder{bundle ? gemvg::Grounder(bundle, taken) : gemvg::Grounder(taken)};
    });
}

gemvg_status gemvg_look(
    const gemvg_grounder* grounder, const gemvg_image* images, size_t count, const gemvg_look_options* options,
    gemvg_scene** scene) {
    return making(scene, [&] {
        std::vector<gemvg::Image> all;
        for (size_t k = 0; k < count; k++) all.push_back(image_of((&given(images, "images"))[k], k));
        gemvg::LookOptions taken;
        if (options) {
            taken.timeout = unless_zero(options->timeout), taken.cancel = cancel_of(options->cancel);
            taken.max_pixels = unless_zero(options->max_pixels), taken.keep = unless_zero(options->keep);
            taken.pruning = unless_null(options->pruning);
        }
        return new gemvg_scene{given(grounder, "grounder").grounder.look(all, taken)};
    });
}

gemvg_status gemvg_ground(
    const gemvg_scene* scene, const char* query, const gemvg_ask_options* options, gemvg_grounding** answer) {
    return making(answer, [&] {
        gemvg::AskOptions taken;
        if (options) {
            taken.timeout = unless_zero(options->timeout), taken.cancel = cancel_of(options->cancel);
            taken.think = options->think, taken.constrained = !options->unconstrained;
        }
        const char* const asked = &given(query, "query");
        return grounding_of(given(scene, "scene").scene.ground(asked, taken));
    });
}

gemvg_status gemvg_mark(const gemvg_scene* scene, const gemvg_box* box, char** text) {
    return making(text, [&] {
        const gemvg_box& one = given(box, "box");
        const std::string mark = given(scene, "scene").scene.mark({one.image, one.x1, one.y1, one.x2, one.y2, {}, {}});
        return std::strcpy(new char[mark.size() + 1], mark.c_str());
    });
}

gemvg_status gemvg_new_cancel(gemvg_cancel** cancel) {
    return making(cancel, [] { return new gemvg_cancel; });
}

gemvg_status gemvg_set_cancel(const gemvg_cancel* cancel) {
    return trying([&] { given(cancel, "cancel").cancel.set(); });
}

size_t gemvg_count(const gemvg_grounding* answer) { return answer ? answer->boxes.size() : 0; }

const gemvg_box* gemvg_box_at(const gemvg_grounding* answer, size_t k) {
    return k < gemvg_count(answer) ? &answer->boxes[k] : nullptr;
}

const char* gemvg_text(const gemvg_grounding* answer) { return answer ? answer->answer.text.c_str() : ""; }

const char* gemvg_thinking(const gemvg_grounding* answer) { return answer ? answer->answer.thinking.c_str() : ""; }

const char* gemvg_problem(const gemvg_grounding* answer) {
    return answer && answer->answer.problem ? answer->answer.problem->c_str() : nullptr;
}

gemvg_timings gemvg_times(const gemvg_grounding* answer) {
    if (!answer) return {};
    const gemvg::Timings& all = answer->answer.timings;
    return {all.preprocess_ms, all.vision_ms,     all.image_prefill_ms, all.query_prefill_ms, all.decode_ms,
            all.image_tokens,  all.cached_tokens, all.query_tokens,     all.answer_tokens};
}

void gemvg_free_grounder(gemvg_grounder* grounder) { delete grounder; }
void gemvg_free_scene(gemvg_scene* scene) { delete scene; }
void gemvg_free_grounding(gemvg_grounding* answer) { delete answer; }
void gemvg_free_cancel(gemvg_cancel* cancel) { delete cancel; }
void gemvg_free_text(char* text) { delete[] text; }
