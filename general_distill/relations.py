"""Multi-head self-attention relation distillation (MiniLMv2, arXiv 2012.15828), with PP-MiniLM's sample relations.

Queries, keys and values of one layer of teacher and student are regrouped into the same number of relation heads,
regardless of the models' own heads. Let X be one of the three, and d its width per relation head. A relation is
R = softmax(X X^T / sqrt(d)), computed over three pairings:

    token-token    X as [batch, heads, tokens, d]: how each token attends to the tokens of its sequence
    head-head      X as [batch, tokens, heads, d]: how the relation heads of one token relate
    sample-sample  X as [tokens, heads, batch, d]: how one position relates across the samples of the micro-batch

The loss of a term is KL(teacher || student), summed over the rows of R and divided by the number of valid rows (for
each term: relation heads x valid tokens of the batch). Padding is masked in rows and in columns.
"""

from common import UserError
from common.compat import paddle

F = paddle.nn.functional

MASKED = -1e9  # added to masked scores, so that their softmax is 0 in float32


def add_relation_arguments(group):
    help = "layers of the student: builds it, 768 wide, from random weights, if none is named; else only checked"
    group.add_argument("--num_layers", type=int, help=help)
    help = "teacher layer to distill, counted from 0; 19 for a large teacher with 24 layers"
    group.add_argument("--teacher_layer_index", type=int, default=19, help=help)
    help = "student layer to train, counted from 0; usually the last one"
    group.add_argument("--student_layer_index", type=int, default=5, help=help)
    help = "relation heads: 64 for a large, 48 for a base teacher; must divide the hidden sizes of both models"
    group.add_argument("--num_relation_heads", type=int, default=64, help=help)
    group.add_argument("--alpha", type=float, default=0.0, help="weight of head-head relations")
    help = "weight of sample-sample relations; the published model used 1.0"
    group.add_argument("--beta", type=float, default=0.0, help=help)
    help = (
        "MB of one tensor of relations: they are computed in as many parts as that needs, and about four such tensors "
    )
    help += "are held at a time; lower it if memory runs out (the result is the same, but for rounding)"
    group.add_argument("--relation_mb", type=float, default=64, help=help, positive=True, without_effect=True)


def check_layers(args, student, teacher):
    """Raises: UserError if layers or relation heads do not fit. Args: student, teacher: configurations of PaddleNLP."""
    pairs = (("student", student, args.student_layer_index), ("teacher", teacher, args.teacher_layer_index))
    for name, config, layer in pairs:
        if not 0 <= layer < config.num_hidden_layers:
            last = config.num_hidden_layers - 1
            raise UserError(f"--{name}_layer_index {layer}: the {name} has layers 0 to {last}")
        if args.num_relation_heads < 1 or config.hidden_size % args.num_relation_heads:
            heads = args.num_relation_heads
            raise UserError(f"--num_relation_heads {heads}: does not divide the {name}'s {config.hidden_size}")
    if args.num_layers not in (None, student.num_hidden_layers):
        raise UserError(f"--num_layers {args.num_layers}: the student has {student.num_hidden_layers}")
    # The loss trains a student up to its layer; in one from a model directory those above are pre-trained at least.
    last = student.num_hidden_layers - 1
    if args.student_layer_index < last and not args.student_model_name_or_path:
        raise UserError(
            f"--student_layer_index {args.student_layer_index}: layers above it, up to {last}, would stay "
            f"random; give --student_layer_index {last}"
        )


class _Captured(Exception):
    """Raised to end a forward pass early, once all three projections are captured."""


class CapturedQKV:
    """Captures the outputs of the query, key and value projections of one encoder layer.

    Args: model: PaddleNLP encoder. layer: its index, from 0.
    """

    def __init__(self, model, layer):
        self.model, self.outputs = model, {}
        attention = model.encoder.layers[layer].self_attn
        for name, projection in (("q", attention.q_proj), ("k", attention.k_proj), ("v", attention.v_proj)):
            projection.register_forward_post_hook(lambda _, inputs, output, name=name: self.capture(name, output))

    def capture(self, name, output):
        self.outputs[name] = output
        if len(self.outputs) == 3:
            # The loss does not need the rest of the layer, the layers above and the pooler: they take 40 % of the
            # forward pass of a model with 2 layers. Only an exception can end PaddleNLP's forward functions early.
            raise _Captured

    def run(self, *inputs):
        """Runs the model on ``inputs`` up to these projections: (q, k, v), float [batch, tokens, hidden] each."""
        self.outputs = {}
        try:
            self.model(*inputs)
        except _Captured:
            outputs, self.outputs = self.outputs, {}
            return outputs["q"], outputs["k"], outputs["v"]
        raise RuntimeError("the model ran to its end without all three projections")


def by_rows(x, heads, term):
    """float [batch, tokens, hidden] in the order of a term: rows that relate to each other stand in the third axis.

    Returns: float [batch, heads, tokens, d] for ``token``, [batch, tokens, heads, d] for ``head``, [tokens, heads,
        batch, d] for ``sample``.
    """
    x = x.reshape([0, 0, heads, -1])
    return x.transpose({"token": [0, 2, 1, 3], "head": [0, 1, 2, 3], "sample": [1, 2, 0, 3]}[term])


def from_rows(x, term):
    """The inverse of by_rows: [batch, tokens, hidden]."""
    x = x.transpose({"token": [0, 2, 1, 3], "head": [0, 1, 2, 3], "sample": [2, 0, 1, 3]}[term])
    return x.flatten(2)


def masks(mask, term):
    """(valid rows, like the first three axes of by_rows or to be broadcast to them; valid columns, or None for all).

    Args: mask: float [batch, tokens], 1 for a token, 0 for padding.
    """
    if term == "head":
        return mask.unsqueeze(-1), None
    mask = mask if term == "token" else mask.transpose([1, 0])  # sample: [tokens, batch]
    return mask.unsqueeze(1), mask.unsqueeze([1, 2])


def log_relation(x, columns):
    """log softmax(X X^T / sqrt(d)), float [..., rows, rows], with padding columns masked. Args: x: [..., rows, d]."""
    scores = paddle.matmul(x, x, transpose_y=True) * x.shape[-1] ** -0.5
    if columns is not None:
        scores = scores + (1.0 - columns) * MASKED
    return F.log_softmax(scores)


class TermSum(paddle.autograd.PyLayer):
    """Sum over valid rows of KL(teacher's relation || student's) for one of Q, K, V: a scalar in nats.

    The relations of a term are far larger than Q, K and V: those of samples in the published micro-batch are 128
    positions x 64 heads x 128 x 128 numbers, 0.54 GB each in FP32, and the usual backward pass would keep several. What
    differs in their leading axis (positions for samples, samples otherwise) is independent, so it is computed in parts,
    each with its gradient, and only the gradient of the student's Q, K or V is kept. With T and P the relations of
    teacher and student, and S = X X^T / sqrt(d) the student's scores,

        d KL(T || P) / dS = P - T        dS -> X:  dX = (G + G^T) X / sqrt(d),  G = P - T on valid rows, 0 on others.
    """

    @staticmethod
    def forward(ctx, student, teacher, mask, heads, term, most):
        """Args: student, teacher: float [batch, tokens, hidden]. most: numbers in one tensor of relations."""
        rows, columns = masks(mask, term)
        x, y = by_rows(student, heads, term), by_rows(teacher, heads, term)
        leading, second, related, width = x.shape
        size = max(1, int(most // (second * related * related)))
        total, gradients = 0.0, []
        for start in range(0, leading, size):
            part = slice(start, start + size)
            valid = columns if columns is None else columns[part]
            log_teacher, log_student = log_relation(y[part], valid), log_relation(x[part], valid)
            of_teacher = log_teacher.exp()
            total = total + ((of_teacher * (log_teacher - log_student)).sum(-1) * rows[part]).sum()
            g = (log_student.exp() - of_teacher) * rows[part].unsqueeze(-1)
            gradients.append(paddle.matmul(g + g.transpose([0, 1, 3, 2]), x[part]) * width**-0.5)
        ctx.save_for_backward(from_rows(paddle.concat(gradients), term))
        return total

    @staticmethod
    def backward(ctx, factor):
        (gradient,) = ctx.saved_tensor()
        return gradient * factor, None, None


def relation_loss(teacher_qkv, student_qkv, mask, heads, alpha=0.0, beta=0.0, most_mb=64.0):
    """(1 - alpha - beta) x token-token + alpha x head-head + beta x sample-sample, summed over Q, K and V.

    Args: teacher_qkv, student_qkv: three tensors [batch, tokens, hidden] each, the hidden sizes may differ; mask: float
        [batch, tokens]; heads: number of relation heads; most_mb: MB of one tensor of relations, at least one position
        or sample.
    Returns: (sum over rows, number of valid rows), so that micro-batches and processes can be added before dividing.
    """
    weights = {"token": 1.0 - alpha - beta, "head": alpha, "sample": beta}
    total = sum(
        weight * TermSum.apply(student, teacher, mask, heads, term, most_mb * 2**20 / 4)  # 4 bytes in FP32
        for term, weight in weights.items()
        if weight
        for teacher, student in zip(teacher_qkv, student_qkv)
    )
    return total, float(mask.sum()) * heads
