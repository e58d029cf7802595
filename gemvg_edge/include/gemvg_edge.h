/* gemvg_edge in C11: ask several pictures a question and get boxes, within this process.
 *
 *     gemvg_grounder *grounder;
 *     gemvg_scene *scene;
 *     gemvg_grounding *answer;
 *     gemvg_image images[2] = {{.path = "left.png"}, {.pixels = right, .height = 480, .width = 640}};
 *     if (gemvg_open(NULL, NULL, &grounder) || gemvg_look(grounder, images, 2, NULL, &scene) ||
 *         gemvg_ground(scene, "the mug", NULL, &answer))
 *         return fprintf(stderr, "%s\n", gemvg_error()), 1;
 *     for (size_t k = 0; k < gemvg_count(answer); k++) use(gemvg_box_at(answer, k)->x1);
 *     gemvg_free_grounding(answer), gemvg_free_scene(scene), gemvg_free_grounder(grounder);
 *
 * What can fail gives a gemvg_status, and where that is not GEMVG_OK, gemvg_error() is the sentence and what was to be
 * made is NULL. Any thread may use any handle; each is freed once, by whoever uses it last, in any order. Texts are
 * UTF-8. Options may be NULL, and a field that is 0 is as if it was left out. Beneath is gemvg_edge.hpp, which see for
 * what is not said here: link CMake's gemvg_edge::c, or compile gemvg_edge.cpp beside your files.
 */
#ifndef GEMVG_EDGE_H
#define GEMVG_EDGE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef enum { GEMVG_OK, GEMVG_FAILED, GEMVG_TIMED_OUT, GEMVG_CANCELLED } gemvg_status;

typedef struct gemvg_grounder gemvg_grounder;
typedef struct gemvg_scene gemvg_scene;
typedef struct gemvg_grounding gemvg_grounding;
typedef struct gemvg_cancel gemvg_cancel;

/* In which order a pixel's bytes lie; grey of 16 bits in this machine's order. */
typedef enum { GEMVG_RGB, GEMVG_BGR, GEMVG_RGBA, GEMVG_BGRA, GEMVG_GREY, GEMVG_GREY16 } gemvg_order;

/* A file, or pixels of yours, which are read where they lie, and only until gemvg_look is back. */
typedef struct {
    const char *path;   /* NULL for pixels */
    const void *pixels; /* of the upper left corner */
    int height, width;
    ptrdiff_t stride; /* bytes from a row to the one below; 0: no gaps between rows */
    gemvg_order order;
} gemvg_image;

typedef struct {
    const char *engine; /* "native", "onnx", .. */
    int threads;
    int64_t max_pixels, max_query_tokens, max_new_tokens;
    int64_t cache_bytes; /* below 0: nothing is kept of earlier looks */
} gemvg_options;

typedef struct {
    double timeout; /* seconds */
    const gemvg_cancel *cancel;
    int64_t max_pixels;
    double keep;
    const char *pruning;
} gemvg_look_options;

typedef struct {
    double timeout; /* seconds */
    const gemvg_cancel *cancel;
    bool think, unconstrained;
} gemvg_ask_options;

typedef struct {
    int image; /* from 0 */
    double x1, y1, x2, y2; /* pixels of the original picture */
    double score; /* 0 to 1; NaN where there is none */
    const char *label; /* NULL where there is none; lives as long as the answer */
} gemvg_box;

typedef struct {
    double preprocess_ms, vision_ms, image_prefill_ms, query_prefill_ms, decode_ms;
    int image_tokens, cached_tokens, query_tokens, answer_tokens;
} gemvg_timings;

/* What went wrong in the last call of this thread that failed; stays until its next one that fails. Never NULL. */
const char *gemvg_error(void);

/* Before everything else: the Python to start, instead of GEMVG_PYTHON's or the one that was built for. */
gemvg_status gemvg_use_python(const char *program);

/* A bundle's folder, or NULL for the model that ships. */
gemvg_status gemvg_open(const char *bundle, const gemvg_options *options, gemvg_grounder **grounder);
gemvg_status gemvg_look(
    const gemvg_grounder *grounder, const gemvg_image *images, size_t count, const gemvg_look_options *options,
    gemvg_scene **scene);
gemvg_status gemvg_ground(
    const gemvg_scene *scene, const char *query, const gemvg_ask_options *options, gemvg_grounding **answer);

/* A box as a query shows it: "the same mug as " and this. To be freed with gemvg_free_text. */
gemvg_status gemvg_mark(const gemvg_scene *scene, const gemvg_box *box, char **text);

/* Ends the requests that were given it, from any thread. */
gemvg_status gemvg_new_cancel(gemvg_cancel **cancel);
gemvg_status gemvg_set_cancel(const gemvg_cancel *cancel);

/* Of an answer; what they point to lives as long as it does. */
size_t gemvg_count(const gemvg_grounding *answer);
const gemvg_box *gemvg_box_at(const gemvg_grounding *answer, size_t k); /* NULL past the end */
const char *gemvg_text(const gemvg_grounding *answer);                  /* what the model wrote */
const char *gemvg_thinking(const gemvg_grounding *answer);
const char *gemvg_problem(const gemvg_grounding *answer); /* why boxes may be missing, or NULL */
gemvg_timings gemvg_times(const gemvg_grounding *answer);

/* NULL is no error. A scene outlives its grounder, an answer both. */
void gemvg_free_grounder(gemvg_grounder *grounder);
void gemvg_free_scene(gemvg_scene *scene);
void gemvg_free_grounding(gemvg_grounding *answer);
void gemvg_free_cancel(gemvg_cancel *cancel);
void gemvg_free_text(char *text);

#ifdef __cplusplus
}
#endif
#endif
