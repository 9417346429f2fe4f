/* Pre-tokenizers: where a text may be cut so that no token spans the cut.
 *
 * Each is a published regular expression, written out: the alternatives in their order, with what backtracking
 * comes to. L, N and \s are the classes of unicode.c. A byte that is no UTF-8 is none of them.
 */
#include "parts.h"

/* A character, where it begins and ends. At the text's end it is nothing: `end` == `at`, and a class of its own. */
struct glance {
    const uint8_t *at, *end;
    uint32_t character;
    int class;
};

#define CLASS_END (-1)

static struct glance look(const uint8_t *at, const uint8_t *end)
{
    struct glance glance = {at, at, NO_CHARACTER, CLASS_END};
    if (at < end) {
        uint32_t nbytes;
        glance.character = character_at(at, end, &nbytes);
        glance.end = at + nbytes;
        glance.class = (int)character_class_of(glance.character);
    }
    return glance;
}

static const uint8_t *run_of(int class, const uint8_t *at, const uint8_t *end)
{
    for (struct glance next = look(at, end); next.class == class; next = look(at, end))
        at = next.end;
    return at;
}

static bool is_newline(uint32_t character)
{
    return character == '\r' || character == '\n';
}

/* 's 't 're 've 'm 'll 'd: the end of one at `at`, which is an apostrophe, or NULL. Without regard to case, U+017F is
 * an s: it folds to one, and is the only character beyond ASCII that folds to a letter of these. */
static const uint8_t *contraction(const uint8_t *at, const uint8_t *end, bool any_case)
{
    static const char pairs[][2] = {{'r', 'e'}, {'v', 'e'}, {'l', 'l'}};
    uint8_t case_bit = any_case ? 0x20 : 0;
    size_t left = (size_t)(end - at);
    uint8_t first = left > 1 ? at[1] | case_bit : 0;
    uint8_t second = left > 2 ? at[2] | case_bit : 0;
    if (first == 's' || first == 't' || first == 'm' || first == 'd')
        return at + 2;
    for (size_t i = 0; i < sizeof pairs / sizeof pairs[0]; i++)
        if (first == pairs[i][0] && second == pairs[i][1])
            return at + 3;
    if (any_case && left > 2 && at[1] == 0xC5 && at[2] == 0xBF)
        return at + 3;
    return NULL;
}

/* White space that no earlier alternative took: \s+(?!\S)|\s+ */
static const uint8_t *spaces(const uint8_t *at, const uint8_t *end)
{
    const uint8_t *last = at, *stop = at;
    for (struct glance next = look(at, end); next.class == CLASS_SPACE; next = look(stop, end)) {
        last = stop;
        stop = next.end;
    }
    return stop == end || last == at ? stop : last;
}

/* \s*[\r\n]+: up to the last newline of the white space at `at`, or NULL. */
static const uint8_t *newlines(const uint8_t *at, const uint8_t *end)
{
    const uint8_t *stop = NULL;
    for (struct glance next = look(at, end); next.class == CLASS_SPACE; next = look(next.end, end))
        if (is_newline(next.character))
            stop = next.end;
    return stop;
}

/* (?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}
 * | ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+ */
const uint8_t *word_of_llama3(const uint8_t *at, const uint8_t *end)
{
    struct glance first = look(at, end), second = look(first.end, end);
    const uint8_t *stop;
    if (first.character == '\'' && (stop = contraction(at, end, true)))
        return stop;
    if (first.class == CLASS_LETTER)
        return run_of(CLASS_LETTER, first.end, end);
    if (first.class == CLASS_NUMBER) {
        struct glance third = look(second.end, end);
        return second.class != CLASS_NUMBER ? first.end : third.class != CLASS_NUMBER ? second.end : third.end;
    }
    if (second.class == CLASS_LETTER && !is_newline(first.character))
        return run_of(CLASS_LETTER, second.end, end);
    if (first.class == CLASS_OTHER || (first.character == ' ' && second.class == CLASS_OTHER)) {
        stop = run_of(CLASS_OTHER, first.end, end);
        while (stop < end && is_newline(*stop))
            stop++;
        return stop;
    }
    return (stop = newlines(at, end)) ? stop : spaces(at, end);
}

/* 's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+ */
const uint8_t *word_of_gpt2(const uint8_t *at, const uint8_t *end)
{
    struct glance first = look(at, end);
    const uint8_t *stop;
    if (first.character == '\'' && (stop = contraction(at, end, false)))
        return stop;
    if (first.class != CLASS_SPACE)
        return run_of(first.class, first.end, end);
    struct glance second = look(first.end, end);
    if (first.character == ' ' && second.class != CLASS_SPACE && second.class != CLASS_END)
        return run_of(second.class, second.end, end);
    return spaces(at, end);
}

/* Numbers one by one; what lies between them is a text of its own to GPT-2's expression. */
const uint8_t *word_of_smollm(const uint8_t *at, const uint8_t *end)
{
    struct glance first = look(at, end), second = look(first.end, end);
    if (first.class == CLASS_NUMBER)
        return first.end;
    if (first.class != CLASS_SPACE)
        return word_of_gpt2(at, end);
    if (second.class != CLASS_SPACE)
        return second.class == CLASS_NUMBER ? first.end : word_of_gpt2(at, end);
    const uint8_t *stop = run_of(CLASS_SPACE, second.end, end);
    return look(stop, end).class == CLASS_NUMBER ? stop : word_of_gpt2(at, end);
}

/* In front of a space, or of several. Only for vocabularies without a piece that goes on after one. */
const uint8_t *word_of_sentencepiece(const uint8_t *at, const uint8_t *end)
{
    bool in_front = true;
    while (at < end) {
        bool escaped = is_escaped_space(at, end), space = *at == ' ' || escaped;
        if (space && !in_front)
            return at;
        in_front = space;
        at += escaped ? ESCAPED_SPACE_BYTES : 1;
    }
    return end;
}

const uint8_t *word_is_all(const uint8_t *at, const uint8_t *end)
{
    (void)at;
    return end;
}
