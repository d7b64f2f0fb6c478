"""smol-smoltalk: 460,000 conversations that suit models of a few hundred million parameters.

python prepare/smol_smoltalk.py --tokenizer=HuggingFaceTB/SmolLM2-135M
"""

import os
import sys

sys.path.insert(0, os.path.join(os.path.dirname(__file__), os.pardir))  # where fledge/ is

from fledge.corpus import Hub, Stage, configure, conversation, prepare

name = 'smol_smoltalk'  # folder under data/
repo = 'HuggingFaceTB/smol-smoltalk'  # on huggingface.co
settings = configure(globals())


def talk(row):
    return [conversation(row)]


stages = [Stage(Hub(repo, split='test'), talk, 'val'), Stage(Hub(repo), talk, 'train')]
prepare(settings, repo, stages, masked=True)
