/* The feed-forward block of layers with experts. */
#ifndef CORDEE_MIXTURE_H
#define CORDEE_MIXTURE_H

#include "step.h"

/* What the block adds to the hidden rows, into the session's `added`. */
void mixture_block(struct step *step);

#endif
