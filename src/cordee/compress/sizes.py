"""What a run of `cordee compress` needs: memory for its widest matrix and for rows, and room on the disk."""

from cordee.compress.calibration import TOKENS_MAX, WINDOW_TOKENS
from cordee.compress.gptq import WIDE_COLUMNS
from cordee.convert.ternary_file import TernaryModel

# Python, numpy and the vocabulary's child.
PROGRAM_BYTES = 150 << 20


def layer_bytes(model: TernaryModel) -> int:
    """The most memory that fitting one matrix takes, without windows of rows.

    Of the widest input: H and the cross products while rows are added, or H with its factor, a copy of it and
    the work of inverting; beside either the matrices of one input, those of both streams.
    """
    most = 0
    for rows, cols in model.matrices().values():
        number = 4 if cols > WIDE_COLUMNS else 8
        most = max(most, cols * cols * (8 + 3 * number) + rows * cols * (4 + 2 * number))
    gates = 2 * model.n_ff * model.n_embd * 4
    return PROGRAM_BYTES + max(most, 2 * gates + 8 * model.n_ff**2)


def window_bytes(model: TernaryModel) -> int:
    """Memory for each window that is computed at a time."""
    width = 4 * model.n_embd + 3 * model.heads * model.head_dim + 4 * model.n_ff
    length = min(model.context, WINDOW_TOKENS)
    return 4 * length * (width + 2 * length)


def disk_bytes(model: TernaryModel, weights: int, needs_rows: bool) -> int:
    """What a run writes: the file, the layers in the folder, and rows of both streams three times."""
    tables = 2 * model.n_embd * model.n_vocab * 9 // 8
    rows = 2 * TOKENS_MAX * (2 * model.n_embd + model.heads * model.head_dim) * 4 if needs_rows else 0
    return model.weight_planes * weights // 2 + tables + rows
