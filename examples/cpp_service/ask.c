/* Ask some picture files one question, in C.
 *
 *     ask left.png right.png "all balls"
 *
 * A line a box: picture, x1 y1 x2 y2, score. Exit code 2 and a sentence where that cannot be done.
 */
#include <stdio.h>
#include <stdlib.h>

#include "gemvg_edge.h"

int main(int count, char **words) {
    if (count < 3) return fprintf(stderr, "usage: ask PICTURE... QUERY\n"), 2;
    const size_t pictures = (size_t)count - 2;
    gemvg_image *images = calloc(pictures, sizeof *images);
    if (!images) return 2;
    for (size_t k = 0; k < pictures; k++) images[k].path = words[k + 1];

    const gemvg_ask_options options = {.timeout = 60};
    gemvg_grounder *grounder = NULL;
    gemvg_scene *scene = NULL;
    gemvg_grounding *answer = NULL;
    gemvg_status status = gemvg_open(NULL, NULL, &grounder);
    if (!status) status = gemvg_look(grounder, images, pictures, NULL, &scene);
    if (!status) status = gemvg_ground(scene, words[count - 1], &options, &answer);
    if (status) fprintf(stderr, "ask: %s\n", gemvg_error());

    for (size_t k = 0; k < gemvg_count(answer); k++) {
        const gemvg_box *box = gemvg_box_at(answer, k);
        printf("%d %.17g %.17g %.17g %.17g %.17g\n", box->image, box->x1, box->y1, box->x2, box->y2, box->score);
    }
    if (gemvg_problem(answer)) fprintf(stderr, "ask: %s\n", gemvg_problem(answer));
    gemvg_free_grounding(answer);
    gemvg_free_scene(scene);
    gemvg_free_grounder(grounder);
    free(images);
    return status ? 2 : 0;
}
