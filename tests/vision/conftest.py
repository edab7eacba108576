import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import vision_libraries

vision_libraries.enable()
