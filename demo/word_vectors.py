"""Word vectors from counts, without training: what the embeddings of a model can start from instead of random numbers.

A model that starts from nothing first learns how frequent tokens are, then stays at that loss for thousands of steps:
attention cannot tell which neighbours matter before the embeddings mean something, and the embeddings learn little
before attention passes the neighbours on. Vectors of tokens that stand beside the same tokens are a way out.
"""

import itertools

import numpy as np
from scipy import sparse
from sklearn.utils.extmath import randomized_svd

from common import UserError

WINDOW = 5  # tokens on either side that count as neighbours
LINES = 20_000  # that are tokenized and counted together
RARE = 5  # a token with fewer occurrences keeps its random vector


def count_neighbours(texts, tokenizer, max_seq_length, size):
    """Counts of tokens, and of tokens beside each other.

    Args: texts: iterable of str. size: of the model's vocabulary, which may be larger than the tokenizer's.
    Returns: (occurrences, int64 [vocabulary]; pairs, a sparse symmetric matrix [vocabulary, vocabulary]: a neighbour at
        distance d counts 1/d, as in GloVe).
    """
    occurrences, pairs = np.zeros(size, np.int64), sparse.csr_matrix((size, size))
    texts, gap = iter(texts), [-1] * WINDOW
    while block := list(itertools.islice(texts, LINES)):
        # One long sequence without [CLS] and [SEP], in which a gap of -1 keeps sentences out of each other's windows.
        encoded = [ids[1:-1] + gap for ids, _ in tokenizer.encode(block, None, max_seq_length)]
        ids = np.fromiter(itertools.chain.from_iterable(encoded), np.int64)
        occurrences += np.bincount(ids[ids >= 0], minlength=size)
        for distance in range(1, WINDOW + 1):
            left, right = ids[:-distance], ids[distance:]
            both = (left >= 0) & (right >= 0)
            weights = np.full(both.sum(), 1 / distance)
            pairs = pairs + sparse.coo_matrix((weights, (left[both], right[both])), pairs.shape).tocsr()
    return occurrences, pairs + pairs.T


def factorize(pairs, size):
    """Vectors whose dot products approximate how much more often than by chance two tokens are neighbours.

    The positive pointwise mutual information log(p(a, b) / p(a) p(b)), with context probabilities to the power of 0.75
    and the square roots of the singular values, as Levy, Goldberg and Dagan (TACL 2015) recommend.

    Args: pairs: of count_neighbours. Returns: float32 [vocabulary, size] in rows of length 1, or 0 without neighbours.
    """
    counts = pairs.tocoo()
    totals = np.asarray(pairs.sum(axis=1)).ravel()
    contexts = totals**0.75 / (totals**0.75).sum()
    information = np.log(counts.data / (totals[counts.row] * contexts[counts.col]))
    kept = information > 0
    matrix = sparse.csr_matrix((information[kept], (counts.row[kept], counts.col[kept])), pairs.shape)
    vectors, singular_values, _ = randomized_svd(matrix, size, n_iter=3, random_state=0)
    vectors = vectors * np.sqrt(singular_values)
    return (vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-9)).astype("float32")


def warm_start(model, texts, tokenizer, max_seq_length):
    """Gives a model for masked language modelling word vectors, and the frequencies of the tokens as its output bias.

    The output layer has the same weights as the embeddings, so what attention gathers of the neighbours' vectors is a
    useful prediction from the first step on.

    Raises: UserError if the texts have too few tokens for vectors of the model's width.
    """
    embeddings = model.get_input_embeddings().weight
    vocabulary, size = embeddings.shape
    occurrences, pairs = count_neighbours(texts, tokenizer, max_seq_length, vocabulary)
    frequent = occurrences >= RARE
    if frequent.sum() <= size:
        raise UserError(f"--warm_start: only {frequent.sum()} tokens are frequent, more than hidden_size {size} needed")
    vectors = factorize(pairs, size)
    # As large as the random vectors that they replace: the rest of the model is initialized for that.
    vectors *= model.config.initializer_range / vectors[frequent].std()
    embeddings.set_value(np.where(frequent[:, None], vectors, embeddings.numpy()))
    model.lm_head.bias.set_value(np.log((occurrences + 0.5) / (occurrences + 0.5).sum()).astype("float32"))
    print(f"warm start: word vectors of {frequent.sum():,} tokens from {occurrences.sum():,} occurrences")
