# One dial: give a depth, and the rest follows; or a time, and the depth follows as well.
#   python train.py --n_layer=8 config/depth.py
#   python train.py --max_minutes=60 config/depth.py
# With both, there are as many tokens as the time allows. --dry_run gives the answer alone. Any
# other setting that you give holds, and the rest follows from it.
#
# width           32 a layer, in heads of 64, of which three share their keys and values
# tokens          20 for each parameter in matrix products, or what the time allows
# tokens a step   2,048 in the default run, and with 6M tokens; they grow with these to the 0.383
# learning rate   Muon's 1.5e-2 (AdamW's 1e-3) in the default run; it grows with the root of the
#                 tokens a step, and falls with the root of the width
# weight decay    takes the same share of the weights over a whole run as in the default run
# depth           the one whose predicted loss is lowest: a few depths take some steps here, which
#                 tell how many tokens each would see in the time
#
# fledge/depth.py has the rules, their constants, and whose they are.
from fledge import depth

settle = depth.settle
