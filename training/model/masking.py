"""Choose the tokens of a text that a masked language model must predict, and hide them. Pure functions of a seed."""

import numpy as np
from numpy.typing import ArrayLike, NDArray
from transformers import PreTrainedTokenizerBase

from training.model.batching import Ids

# Of the chosen tokens, these shares are replaced by the mask token and by a random token; the rest stays (BERT).
MASKED, RANDOM = 0.8, 0.1
CONTINUATION = "##"


class Masking:
    """Hides about `share` of the words of a text: 80 % become the mask token, 10 % a random one, 10 % stay.

    With a WordPiece vocabulary all pieces of a word are chosen together; with others each token is a word of its own.
    Special tokens and unknown words are never chosen.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, share: float) -> None:
        names = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
        self._share = share
        self._mask_id = tokenizer.mask_token_id
        self._special = np.zeros(len(names), bool)
        self._special[tokenizer.all_special_ids] = True
        self._ordinary = np.flatnonzero(~self._special)
        self._continues = np.array([name is not None and name.startswith(CONTINUATION) for name in names])

    def __call__(self, ids: ArrayLike, *seed: int) -> tuple[Ids, NDArray[np.bool_]]:
        """Return the ids (T,) int64 with hidden tokens, and which tokens were chosen (T,).

        The same seed gives the same. At least one token is chosen, unless all are special.
        """
        generator = np.random.default_rng(seed)
        given = np.asarray(ids, np.int64)
        allowed = ~self._special[given]
        begins = ~self._continues[given]
        word = np.cumsum(begins) - int(begins[0])  # the number of each token's word, from 0
        picked = generator.random(len(given)) < self._share  # one number per word; there are at most as many
        chosen = picked[word] & allowed
        if not chosen.any() and allowed.any():
            chosen = allowed & (word == generator.choice(word[allowed]))
        draw = generator.random(len(given))
        hidden = np.where(chosen & (draw < MASKED), self._mask_id, given)
        random = generator.choice(self._ordinary, len(given))
        return np.where(chosen & (draw >= MASKED) & (draw < MASKED + RANDOM), random, hidden), chosen
