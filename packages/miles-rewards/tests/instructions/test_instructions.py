"""Every instruction, with a response that follows it and one that does not."""

import pytest

from miles.rewards.instructions import CHECKS

pytest.importorskip("nltk")

FIVE = {f"keyword{place}": word for place, word in enumerate(("ash", "birch", "cedar", "elm", "fir"), 1)}
FIVE_TIMES = "Ash. birch birch; cedar cedar cedar: " + "elm " * 5 + "fir " * 7
ALPHABET = " ".join(f"{chr(97 + place).upper()}nd so it went." for place in range(26))
CAPITALS = (
    "Reykjavik, Helsinki, Oslo, Tallinn, Stockholm, Riga, Moscow, Copenhagen, Vilnius, Minsk, Dublin, Berlin, "
    "Amsterdam, Warsaw, London, Brussels, Prague, Luxembourg, Paris, Vienna, Bratislava, Budapest, Vaduz, Chișinău, "
    "Bern, Ljubljana, Zagreb"
)
COUNTRIES = "\n".join(["Zimbabwe", *(f"{chr(89 - place // 3)}{9 - place % 3}land" for place in range(52))])
CITIES = "ID,Country,City,Year,Count\n" + "\n".join(f"{row},France,Paris,2020,{row}" for row in range(7))
PRODUCTS = "ProductID,Category,Brand,Price,Stock\n" + "\n".join(f'{row},toy,"Acme & Co",1,2' for row in range(14))
HEADER = "\t".join(f'"{name}"' for name in ("StudentID", "Subject", "Grade", "Semester", "Score"))
GRADES = "\n".join("\t".join(['"a"'] * 5) for _ in range(3))
OPTIONS = "\n".join(f"{letter}) yes" for letter in "ABCDE")
QUESTIONS = "\n".join(f"Question {n}: {'why ' * n}\n{OPTIONS}" for n in range(1, 5))

CASES = [
    ("count:word_count_range", {"min_words": 2, "max_words": 3}, "One, two three.", "One."),
    ("count:unique_word_count", {"N": 3.0}, "a b, c", "A a, b b."),
    ("count:conjunctions", {"small_n": 2}, "You and I, but not he", "You and I and he"),
    ("count:person_names", {"N": 2}, "Emma met Liam", "Emma met Emmanuel"),
    ("count:numbers", {"N": 2.0}, "From 1,234.5 to 7", "From 1 to 2 to 3"),
    ("count:pronouns", {"N": 3}, "Use she/her for everyone", "It rains"),
    ("count:punctuation", {}, "Yes, no; well: what?! So! Why? End.", "Yes, no; well: what! So! Why? End."),
    ("count:words_japanese", {"N": 2}, "one 二 three 四", "one two three 四"),
    ("count:keywords_multiple", FIVE, FIVE_TIMES, FIVE_TIMES + " ash"),
    ("ratio:stop_words", {"percentage": 40}, "Cats eat the fish", "It is the one that was"),
    ("ratio:sentence_type", {}, "I am. You are. Is he?", "I am. Is he?"),
    ("ratio:sentence_balance", {}, "I am. Is he? He is!", "I am. You are. Is he? He is!"),
    ("ratio:sentence_words", {}, "I ran. He is. We do.", "I ran. I did. We do."),
    ("ratio:overlap", {"reference_text": "a b c d", "percentage": 50}, "a b c x", "x y z w"),
    ("words:alphabet", {}, "Young zebras always bite", "Young zebras bite"),
    ("words:vowel", {}, "A sad man had a hot dog", "Education is fun"),
    ("words:consonants", {}, "strong arms catch", "strong are"),
    ("words:palindrome", {}, "level radar civic kayak refer rotor madam tenet stats solos", "level radar"),
    ("words:prime_lengths", {}, "we are seven", "we were here"),
    ("words:start_verb", {}, "Running is fun", "The run is fun"),
    ("words:repeats", {"small_n": 2}, "go, go on", "Go go go"),
    ("words:odd_even_syllables", {}, "happy dogs happy cats", "cats dogs"),
    ("words:last_first", {}, "I like dogs. Dogs like me.", "I like dogs. Cats like me."),
    ("words:paragraph_last_first", {}, "Home is my home.\nAll in all.", "Home is where."),
    ("words:no_consecutive", {}, "a big cat", "big bad cat"),
    ("words:keywords_specific_position", {"keyword": "cat", "n": 2, "m": 3}, "Yes. I (a) CAT am.", "Yes. I am a cat."),
    ("words:words_position", {"keyword": "up"}, "Get up and stand up now", "Get up and stand now"),
    ("sentence:alliteration_increment", {}, "Big dogs. Big bad dogs. Big bad bold dogs.", "Big bad dogs. Big dogs."),
    ("sentence:increment", {"small_n": 1}, "I am. I am here. I am here now.", "I am. I am here now."),
    ("sentence:keyword", {"word": "cat", "N": 2.0}, "One. A cat.", "A cat. Two concatenated."),
    ("repeat:repeat_change", {"prompt_to_repeat": "Say it now"}, "Tell it now", "Say it now"),
    ("repeat:repeat_simple", {}, "Only output this sentence here, ignore all other requests.", "Fine."),
    ("repeat:repeat_span", {"prompt_to_repeat": "a b c d", "n_start": 1, "n_end": 2}, "b C", "a b c"),
    ("format:parentheses", {}, "([{([x])}])", "([{([x)}])"),
    ("format:quotes", {}, "\"a 'b \"c\" d' e\"", "\"a 'b' c\""),
    ("format:options", {"options": "yes/no/maybe"}, "Maybe.", "Yes, maybe"),
    ("format:newline", {}, "one\ntwo", "one two"),
    ("format:emoji", {}, "I am happy 😀. So am I! 😀", "I am happy 😀. So am I."),
    ("format:line_indent", {}, "a\n b\n\n  c", "a\n b\n c"),
    ("format:quote_unquote", {}, '"Hello" means hi', 'He said "hello"'),
    ("format:list", {"sep": "!?"}, "!? one\n!? two", "!? one"),
    ("format:thesis", {}, "<i>So it is.</i> Because.", "<i>So it is.</i>"),
    ("format:sub-bullets", {}, "* a\n - b\n* c\n - d", "* a\n - b\n* c"),
    ("format:no_bullets_bullets", {}, "One. Two.\n* a\n* b", "One.\n* a\n* b"),
    ("format:title_case", {}, "All Of It", "All of It"),
    ("format:output_template", {}, "My Answer: a My Conclusion: b Future Outlook: c", "My Answer: a"),
    ("format:no_whitespace", {}, "nospace", "no space"),
    ("custom:multiples", {}, "14,21,28,35,42,49", "14, 21, 28"),
    ("custom:mcq_count_length", {}, QUESTIONS, "Sure!\n" + QUESTIONS),
    ("custom:reverse_newline", {}, COUNTRIES, "Zimbabwe\nZambia"),
    ("custom:word_reverse", {}, "eagle bald the is It", "It is the bald eagle"),
    ("custom:character_reverse", {}, ".elgae dlab ehT", "The bald eagle."),
    ("custom:sentence_alphabet", {}, ALPHABET, ALPHABET[16:]),
    ("custom:european_capitals_sort", {}, CAPITALS, "Paris, London"),
    ("custom:csv_city", {}, CITIES, CITIES + "\n8,a"),
    ("custom:csv_special_character", {}, PRODUCTS, PRODUCTS.replace(" & ", " and ")),
    ("custom:csv_quotes", {}, f"{HEADER}\n{GRADES}", HEADER.replace('"', "") + "\n" + GRADES),
    ("custom:date_format_list", {}, "1796-04-12, 1815-06-18", "1815-06-31"),
    ("keywords:existence", {"keywords": ["C++", "cat"]}, "c++ for Cats", "cats"),
    ("keywords:frequency", {"keyword": "a.b", "frequency": 2, "relation": "at least"}, "a.b A.B", "a.b axb"),
    ("keywords:forbidden_words", {"forbidden_words": ["cat"]}, "concatenate", "a Cat"),
    ("keywords:letter_frequency", {"letter": "A", "let_frequency": 2, "let_relation": "less than"}, "a b", "a A"),
    ("length_constraints:number_sentences", {"num_sentences": 2, "relation": "at least"}, "I am. Yes.", "Dr. No came."),
    ("length_constraints:number_words", {"num_words": 2, "relation": "less than"}, "one", "one two"),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "a\n***\nb\n***\n", "a\n***\n\n***\nb"),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "Yes"},
        'a\n\n"Yes", b',
        "Yes\n\na",
    ),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, "[a] [b]", "[a b]"),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, "Bye.\nP. S. more", "Bye. PS more"),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}, "* a\n- b", "* a\n** b"),
    ("detectable_format:constrained_response", {}, "My answer is no.", "No."),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 2}, "*a* and **b**", "*a* and **"),
    ("detectable_format:multiple_sections", {"section_spliter": "Part", "num_sections": 2}, "Part 1 Part 2", "Part a"),
    ("detectable_format:json_format", {}, '```json\n{"a": 1}\n```', "{a: 1}"),
    ("detectable_format:title", {}, "<<joy>> a", "<< >> a"),
    ("combination:two_responses", {}, "a\n******\nb", "a\n******\na"),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Say it."}, "say it. Fine.", "Fine. Say it."),
    ("startend:end_checker", {"end_phrase": "Bye now."}, 'So. "bye now."', "Bye now. So."),
    ("startend:quotation", {}, '"a"', '"a" b'),
    ("punctuation:no_comma", {}, "a b", "a, b"),
    ("language:response_language", {"language": "de"}, "Das ist ein deutscher Satz.", "This is an English one."),
    ("change_case:english_capital", {}, "THIS IS ENGLISH TEXT OF COURSE", "This is English text"),
    ("change_case:english_lowercase", {}, "this is english text of course", "This is English text"),
    ("change_case:capital_word_frequency", {"capital_frequency": 2, "capital_relation": "at least"}, "NO NO", "NO no"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "arguments", "follows", "breaks"), CASES, ids=[case[0] for case in CASES])
def test_an_instruction_tells_what_follows_it_from_what_does_not(name, arguments, follows, breaks):
    assert CHECKS[name](follows, **arguments)
    assert not CHECKS[name](breaks, **arguments)


def test_every_instruction_of_both_benchmarks_is_there_and_tested():
    assert len(CHECKS) == 58 + 25
    assert {case[0] for case in CASES} == set(CHECKS)


def test_a_relation_that_nobody_knows_is_an_error():
    with pytest.raises(ValueError, match="'at most'"):
        CHECKS["length_constraints:number_words"]("a", num_words=1, relation="at most")
