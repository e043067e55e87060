"What was trained is merged, spoken to and compared"
from sage_finetune import modeling  # first: it silences a library before that is imported
