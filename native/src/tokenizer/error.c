/* Failing with a sentence. */
#include <string.h>

#include "parts.h"

tokenizer_status tokenizer_fail(tokenizer_error *error, tokenizer_status status, const char *text)
{
    if (error) {
        size_t length = strlen(text);
        memcpy(error->text, text, length + 1);
    }
    return status;
}

tokenizer_status tokenizer_fail_at(tokenizer_error *error, const char *text, uint32_t number)
{
    char sentence[sizeof error->text], digits[10];
    _Static_assert(ERROR_TEXT_MAX + 1 + sizeof digits + 1 <= sizeof sentence, "text, number and a zero have room");
    size_t length = strlen(text), first = sizeof digits;
    do
        digits[--first] = (char)('0' + number % 10);
    while (number /= 10);
    memcpy(sentence, text, length);
    sentence[length++] = ' ';
    memcpy(sentence + length, digits + first, sizeof digits - first);
    sentence[length + sizeof digits - first] = 0;
    return tokenizer_fail(error, TOKENIZER_BAD_FILE, sentence);
}
