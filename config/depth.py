# One dial: give a depth, and the rest follows; or a time, and the depth follows as well.
#   python train.py --n_layer=8 config/depth.py
#   python train.py --max_minutes=60 config/depth.py
# With both, there are as many tokens as the time allows; with a depth alone there is no limit of
# time. --dry_run gives the answer alone. Any other setting that you give holds, and the rest
# follows from it.
#
# width           32 a layer, in heads of 64; where there are enough of these, three or more share
#                 one head for keys and values
# tokens          20 for each parameter that is in a matrix product, or what the time allows
# tokens a step   2,048 in the default run, with 4.5M tokens; they grow with these to the 0.383
# learning rate   Muon's 1.5e-2 (AdamW's 1e-3) in the default run; it grows with the root of the
#                 tokens a step, and falls with the root of the width
# weight decay    less in a longer run: over all of it as much of the weights decays as in the
#                 default run
# depth           the one whose predicted loss is lowest: a few depths take some steps here, which
#                 tell how many tokens each would see in the time
#
# fledge/depth.py has the rules, their constants, and whose they are.
one_dial = True
