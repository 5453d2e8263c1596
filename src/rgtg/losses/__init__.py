"""Training objectives as pure functions of tensors.

In every function, ``scores[b, i - 1]`` is r(x, y_{1:i}), the score of the first i tokens of completion b. Masks are
true on a completion's own tokens, and completions start at column 0. All arithmetic is in fp32. The loss of a batch is
the mean over pairs (or completions) of the loss of each, so that the mean over a global batch is the mean of its parts.
"""

from rgtg.losses.coherent import coherence_losses as coherence_losses
from rgtg.losses.coherent import tcrm_pair_losses as tcrm_pair_losses
from rgtg.losses.pairwise import Weighting as Weighting
from rgtg.losses.pairwise import agreement as agreement
from rgtg.losses.pairwise import bradley_terry_loss as bradley_terry_loss
from rgtg.losses.pairwise import completion_window as completion_window
from rgtg.losses.pairwise import fit_length_offset as fit_length_offset
from rgtg.losses.pairwise import hold_last as hold_last
from rgtg.losses.pairwise import last_score as last_score
from rgtg.losses.pairwise import mean_of_counted as mean_of_counted
from rgtg.losses.pairwise import mean_over as mean_over
from rgtg.losses.pairwise import position_weights as position_weights
from rgtg.losses.pairwise import prefix_bradley_terry_loss as prefix_bradley_terry_loss
from rgtg.losses.pairwise import prefix_bradley_terry_pair_losses as prefix_bradley_terry_pair_losses
from rgtg.losses.pairwise import prefix_margins as prefix_margins
from rgtg.losses.pairwise import prefixes_differ as prefixes_differ
from rgtg.losses.pairwise import sample_positions as sample_positions
from rgtg.losses.pairwise import with_length as with_length
from rgtg.losses.values import bellman_losses as bellman_losses
from rgtg.losses.values import cumulative_mse_losses as cumulative_mse_losses
from rgtg.losses.values import fudge_losses as fudge_losses
from rgtg.losses.vocabulary import autoregressive_pair_losses as autoregressive_pair_losses
from rgtg.losses.vocabulary import farma_consistency_losses as farma_consistency_losses
from rgtg.losses.vocabulary import token_log_probs as token_log_probs
