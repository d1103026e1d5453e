"""Solutions of small tasks, right and plain; tasks.py makes tasks and styles of them."""


def add_all(numbers):
    total = 0
    for n in numbers:
        total += n
    return total


def largest_gap(numbers):
    ordered = sorted(numbers)
    return max(ordered[at + 1] - ordered[at] for at in range(len(ordered) - 1))


def count_vowels(text):
    return sum(letter in "aeiou" for letter in text)


def reverse_words(text):
    return " ".join(text.split()[::-1])


def gcd_of(a, b):
    while b:
        a, b = b, a % b
    return a


def next_prime(n):
    n += 1
    while any(n % d == 0 for d in range(2, int(n ** 0.5) + 1)):
        n += 1
    return n


def fib(n):
    a, b = 0, 1
    for _ in range(n):
        a, b = b, a + b
    return a


def flatten(rows):
    return [item for row in rows for item in row]


def rotate(items, k):
    k %= len(items)
    return items[k:] + items[:k]


def dedupe(items):
    seen = set()
    return [x for x in items if not (x in seen or seen.add(x))]


def running_max(numbers):
    best = []
    for n in numbers:
        best.append(n if not best else max(best[-1], n))
    return best


def deepest(text):
    depth = best = 0
    for letter in text:
        depth += (letter == "(") - (letter == ")")
        best = max(best, depth)
    return best


def to_roman(n):
    out = ""
    signs = {100: "C", 90: "XC", 50: "L", 40: "XL", 10: "X", 9: "IX", 5: "V", 4: "IV", 1: "I"}
    for value, sign in signs.items():
        while n >= value:
            out, n = out + sign, n - value
    return out


def digit_sum(n):
    return sum(int(digit) for digit in str(n))


def merge_sorted(a, b):
    out = []
    i = j = 0
    while i < len(a) and j < len(b):
        if a[i] <= b[j]:
            out.append(a[i])
            i += 1
        else:
            out.append(b[j])
            j += 1
    return out + a[i:] + b[j:]


def shared_letters(a, b):
    return "".join(sorted(set(a) & set(b)))


def transpose(rows):
    return [list(column) for column in zip(*rows, strict=True)]


def dot(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True))


def insert_at(items, x):
    low, high = 0, len(items)
    while low < high:
        mid = (low + high) // 2
        if items[mid] < x:
            low = mid + 1
        else:
            high = mid
    return low


def caesar(text, k):
    return "".join(chr((ord(c) - 97 + k) % 26 + 97) if c.isalpha() else c for c in text)


def histogram(text):
    counts = {}
    for letter in text:
        counts[letter] = counts.get(letter, 0) + 1
    return counts


def longest_word(text):
    return max(text.split(), key=len)


def collatz(n):
    steps = 0
    while n != 1:
        n = n // 2 if n % 2 == 0 else 3 * n + 1
        steps += 1
    return steps


def power_mod(a, b, m):
    result = 1
    for _ in range(b):
        result = result * a % m
    return result


def chunk(items, n):
    return [items[i:i + n] for i in range(0, len(items), n)]


def second_largest(numbers):
    return sorted(set(numbers))[-2]


def run_length(text):
    out = []
    for letter in text:
        if out and out[-1][0] == letter:
            out[-1][1] += 1
        else:
            out.append([letter, 1])
    return out


def trace(rows):
    return sum(row[i] for i, row in enumerate(rows))


def mean_of(numbers):
    return sum(numbers) / len(numbers)


def edit_distance(a, b):
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        last, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            last, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, last + (x != y))
    return row[-1]


def cover(spans):
    total, end = 0, None
    for a, b in sorted(spans):
        a = a if end is None else max(a, end)
        if b > a:
            total, end = total + b - a, b
    return total


def titles(text):
    return [word.capitalize() for word in text.split()]
