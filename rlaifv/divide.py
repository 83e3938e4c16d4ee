"""Divide: split an answer into atomic claims and turn each claim into a yes/no question (RLAIF-V, section 2.2)."""

CLAIMS_PROMPT = """\
You are an expert in extracting facts from a question-answer pair for an image. \
Extract and rewrite the facts of the answer into self-contained sentences. \
Leave out opinions and subjective statements. Present the result in this format:

### Facts:
- (fact 1)
- (fact 2)

### Question-answer pair:
Question: {question}
Answer: {answer}"""

QUESTIONS_PROMPT = """\
You are an expert in modifying a declarative sentence into a general question. \
Modify the sentences one by one. Keep the tense and every negation, and add no content. \
Present the result in this format:

### Modified sentences:
- (question 1)
- (question 2)

### Declarative sentences:
{claims}"""
