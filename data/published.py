"""
The four benchmarks that everyone has, as their files are published, in the fields of our problem lines
(data/problems.py).

    set         columns                                                          becomes
    GSM8K       question, answer ("steps #### 72")                               maths
    MATH        problem, solution (with \\boxed{}), level, type; MATH-500: answer  maths
    MBPP        text or prompt, code, test_list, test_setup_code or test_imports   code, check tests
    HumanEval   task_id, prompt, entry_point, canonical_solution, test             code, check tests

read_problems takes these files, so eval.py, rl.py and data/hub.py do. Nothing of a row is executed here: the asserts
are read as text, and each becomes a check test, which the judge runs in a sandbox (docs/judge.md).
"""
import ast
import re

from configurator import UserError


def problem_line(row: dict) -> dict | None:
    """
    The fields of a problem line for a row of a set above; None for a row of no such set. UserError for a row of a set
    that cannot become a problem, with the reason.
    """
    columns = set(row)
    if columns == {"question", "answer"} and isinstance(row["answer"], str) and "####" in row["answer"]:
        return gsm8k(row)
    if {"problem", "solution"} <= columns and not {"kind", "generations"} & columns:
        return math(row)
    if {"test_list", "code"} <= columns:
        return mbpp(row)
    if {"prompt", "entry_point", "test", "canonical_solution"} <= columns:
        return humaneval(row)
    return None


# ---- maths ----------------------------------------------------------------------------------------------------------

def gsm8k(row: dict) -> dict:
    """answer = steps, "#### ", final number. The steps' calculator marks <<3*4=12>> are taken out."""
    question, answer = text_of(row, "question"), text_of(row, "answer")
    steps, mark, final = answer.rpartition("####")
    if not mark or not final.strip():
        raise UserError("answer has no '#### ' before its final number")
    final = final.strip().replace(",", "")
    return {"kind": "maths", "question": question, "answer": final,
            "reasoning": re.sub(r"<<[^<>]*>>", "", steps).strip(), "solution": f"The answer is \\boxed{{{final}}}."}


def math(row: dict) -> dict:
    """The answer is that of the column, else what the last \\boxed{} of the solution holds. level: "Level 3" or 3."""
    question, solution = text_of(row, "problem"), text_of(row, "solution")
    answer = row["answer"] if isinstance(row.get("answer"), str) else last_boxed(solution)
    if not answer:
        raise UserError("solution has no \\boxed{} with the answer")
    level = re.search(r"\d", str(row.get("level") or ""))
    return {"kind": "maths", "question": question, "answer": answer,
            "level": int(level.group()) if level else 1, "solution": solution}


def last_boxed(text: str) -> str:
    """What the braces of the last \\boxed{} or \\fbox{} hold, "" when there is none."""
    starts = [m.end() for m in re.finditer(r"\\(?:boxed|fbox)\s*\{", text)]
    if not starts:
        bare = re.findall(r"\\boxed\s+(\S+?)\$", text)       # \boxed 2$ stands in a few solutions of MATH
        return bare[-1] if bare else ""
    depth, start = 1, starts[-1]
    for i in range(start, len(text)):
        depth += (text[i] == "{") - (text[i] == "}")
        if not depth:
            return text[start:i].strip()
    return ""


# ---- code -----------------------------------------------------------------------------------------------------------

def mbpp(row: dict) -> dict:
    """The question ends with the asserts: without them nobody could know what the function is called."""
    question, code = text_of(row, "text" if "text" in row else "prompt"), text_of(row, "code")
    setup = row.get("test_setup_code") or "\n".join(row.get("test_imports") or [])
    asserts = [a for a in row["test_list"] if a.strip()]
    entry = called("\n".join(asserts), code)
    return {"kind": "code", "entry": entry, "solution": fenced(code),
            "question": f"{question.strip()}\nYour code should pass these tests:\n" + "\n".join(asserts),
            "tests": checks("\n".join([setup, *asserts]), entry)}


def humaneval(row: dict) -> dict:
    """
    `test` is a function check(candidate) full of asserts, which may use what the prompt has before the function. The
    question is the prompt: a function without a body.
    """
    prompt, entry = text_of(row, "prompt"), text_of(row, "entry_point")
    before = re.split(rf"^def {re.escape(entry)}\b", prompt, maxsplit=1, flags=re.M)[0]
    return {"kind": "code", "entry": entry, "tests": checks(f"{before}\n{text_of(row, 'test')}", entry),
            "question": f"Complete this function:\n{fenced(prompt)}",
            "solution": fenced(prompt + text_of(row, "canonical_solution"))}


def checks(code: str, entry: str) -> list[dict]:
    """The asserts of the code as tests of a problem line."""
    return [{"kind": "check", "input": test} for test in check_tests(code, entry)]


def fenced(code: str) -> str:
    """A fenced program, as the judge looks for in an answer."""
    return "```python\n" + code.replace("\r\n", "\n").strip("\n") + "\n```"


def parsed(code: str, what: str) -> list[ast.stmt]:
    """Its statements. UserError when it is not Python."""
    try:
        return ast.parse(code).body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise UserError(f"{what}: not Python ({error})") from None


def called(tests: str, program: str) -> str:
    """Name of the first function that the tests call and the program defines. UserError when there is none."""
    defined = {node.name for node in parsed(program, "code") if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    nodes = [node for statement in parsed(tests, "test_list") for node in ast.walk(statement)]
    names = [node.func.id for node in nodes if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
    if not (found := [name for name in names if name in defined]):
        raise UserError("its tests call no function that its code defines")
    return found[0]


def check_tests(code: str, entry: str) -> list[str]:
    """
    Asserts as MBPP publishes them (test_setup_code and test_list, joined), or HumanEval's `test` with its
    check(candidate) -> code for one check test for every assert, with the statements before it that it needs.

    HumanEval's asserts may use helpers of the prompt: put the prompt's text before the function in front of `code`.
    UserError if the code is not Python, or has no assert.
    """
    body = parsed(code, f"tests of {entry}")
    for i, statement in enumerate(body):
        if isinstance(statement, ast.FunctionDef) and statement.name == "check":
            calls = [s for s in body[i + 1:] if isinstance(s, ast.Expr) and ast.unparse(s.value).startswith("check(")]
            body = [s for s in body[:i] + body[i + 1:] if s not in calls] + statement.body
            break
    tests, before = [], []
    for statement in body:
        if not any(isinstance(node, ast.Assert) for node in ast.walk(statement)):
            before.append(statement)
            continue
        if isinstance(statement, ast.Assert):
            statement.msg = None
        names = {node.id for node in ast.walk(statement) if isinstance(node, ast.Name)}
        needed = []
        for earlier in reversed(before):                    # what binds or changes a name that is used further down
            used = {node.id for node in ast.walk(earlier) if isinstance(node, ast.Name)}
            if (names | {"*"}) & (used | bound_names(earlier)) - {entry, "candidate"}:
                needed.insert(0, earlier)
                names |= used
        if not names & {entry, "candidate"}:                # `assert True`: HumanEval has some
            continue
        tests.append("\n".join(map(ast.unparse, [*needed, statement])))
    if not tests:
        raise UserError(f"tests of {entry}: no assert about {entry} in them")
    return tests


def bound_names(statement: ast.stmt) -> set[str]:
    """The names that functions, classes and imports in a statement bind; variables are ast.Name nodes anyway."""
    return {name.split(".")[0] for node in ast.walk(statement) for name in
            ([node.name] if isinstance(node, (ast.FunctionDef, ast.ClassDef)) else
             [alias.asname or alias.name for alias in node.names] if isinstance(node, (ast.Import, ast.ImportFrom))
             else [])}


def text_of(row: dict, column: str) -> str:
    """row[column], a text that is not empty; else UserError."""
    if not isinstance(row.get(column), str) or not row[column].strip():
        raise UserError(f"{column} should be text, is {row.get(column)!r:.40}")
    return row[column]
