import sys
from pathlib import Path
from samr1_mini.tiny import pretrain as p
W=Path('/tmp/w/sam9'); W.mkdir(exist_ok=True)
p.train_sam(int(sys.argv[1]), W/'sam.safetensors', W)
