"""The instruction of each task of MTEB(eng, v1), as the NeoBERT paper evaluates with them.

Tables 8 and 9 of the paper (Appendix D.3), their templates and abbreviations written out.
RedditClusteringP2P and StackExchangeClusteringP2P have no row of their own there; their sentences
follow the paper's evaluation code, as does that queries and documents get the same instruction. How
it is joined to a text the paper does not say: here by a space, so that it is an ordinary
sentence-transformers prompt.
"""

from __future__ import annotations

_SIMILAR = "Retrieve semantically similar text."
_CATEGORY = "Identify the main and secondary category of {} papers based on their {}."
_TOPIC = "Identify the topic or theme of {} posts based on their {}."
_SUPPORT_OR_REFUTE = "retrieve documents that support or refute the claim"

# Table 8.
RETRIEVAL = {
    "DBPedia": "Given a query, retrieve relevant entity descriptions from DBPedia.",
    "FEVER": f"Given a claim, {_SUPPORT_OR_REFUTE}.",
    "FiQA2018": "Given a financial question, retrieve user replies that best answer the question.",
    "HotpotQA": "Given a multi-hop question, retrieve documents that can help answer the question.",
    "MSMARCO": "Given a web search query, retrieve relevant passages that answer the query.",
    "NFCorpus": "Given a question, retrieve relevant documents that best answer the question.",
    "NQ": "Given a question, retrieve Wikipedia passages that answer the question.",
    "QuoraRetrieval": "Given a question, retrieve questions that are semantically equivalent to "
    "the given question.",
    "SCIDOCS": "Given a scientific paper title, retrieve paper abstracts that are cited by the "
    "given paper.",
    "SciFact": f"Given a scientific claim, {_SUPPORT_OR_REFUTE} .",  # the space is the paper's
    "Touche2020": "Given a question, retrieve detailed and persuasive arguments that answer the "
    "question.",
    "TRECCOVID": "Given a query on COVID-19, retrieve documents that answer the query.",
}
SIMILARITY = {
    "BIOSSES": "Retrieve semantically similar text from the biomedical field.",
    "SICK-R": _SIMILAR,
    **{f"STS{year}": _SIMILAR for year in (12, 13, 14, 15, 16, 17, 22)},
    "STSBenchmark": _SIMILAR,
    "SummEval": "Given a news summary, retrieve other semantically similar summaries.",
}

# Table 9.
CLASSIFICATION = {
    "AmazonCounterfactualClassification": "Given an Amazon customer review, classify it as either "
    "counterfactual or not-counterfactual.",
    "AmazonPolarityClassification": "Given an Amazon review, classify its main sentiment into "
    "positive or negative.",
    "AmazonReviewsClassification": "Given an Amazon review, classify it into its appropriate "
    "rating category.",
    "Banking77Classification": "Given a online banking query, find the corresponding intents.",
    "EmotionClassification": "Given a Twitter message, classify the emotion expressed into one of "
    "the six emotions: anger, fear, joy, love, sadness, and surprise.",
    "ImdbClassification": "Given an IMDB movie review, classify its sentiment into positive or "
    "negative.",
    "MassiveIntentClassification": "Given a user utterance, find the user intents.",
    "MassiveScenarioClassification": "Given a user utterance, find the user scenarios.",
    "MTOPDomainClassification": "Given a user utterance, classify the domain in task-oriented "
    "conversation.",
    "MTOPIntentClassification": "Given a user utterance, classify the intent in task-oriented "
    "conversation.",
    "ToxicConversationsClassification": "Given comments, classify them as either toxic or not "
    "toxic.",
    "TweetSentimentExtractionClassification": "Given a tweet, classify its sentiment as either "
    "positive, negative, or neutral.",
}
CLUSTERING = {
    **{
        f"{name}Clustering{kind}": _CATEGORY.format(name, based_on)
        for name in ("Arxiv", "Biorxiv", "Medrxiv")
        for kind, based_on in (("P2P", "titles and abstracts"), ("S2S", "titles"))
    },
    **{f"{name}Clustering": _TOPIC.format(name, "titles") for name in ("Reddit", "StackExchange")},
    "TwentyNewsgroupsClustering": "Identify the topic or theme of the given news articles.",
}

# Table 9 again, and the two without a row. ArguAna's ends there in a stray "Document".
OTHERS = {
    "ArguAna": "Given a claim, find documents that refute the claim.",
    "AskUbuntuDupQuestions": "Retrieve duplicate questions from AskUbuntu forum.",
    "ClimateFEVER": f"Given a claim about climate change, {_SUPPORT_OR_REFUTE}.",
    **{
        f"CQADupstack{forum}Retrieval": "Given a question, retrieve detailed question descriptions "
        "from Stackexchange that are duplicates to the given question."
        for forum in (
            "",  # the benchmark's task, which is the twelve others
            "Android",
            "English",
            "Gaming",
            "Gis",
            "Mathematica",
            "Physics",
            "Programmers",
            "Stats",
            "Tex",
            "Unix",
            "Webmasters",
            "Wordpress",
        )
    },
    "MindSmallReranking": "Given a user browsing history, retrieve relevant news articles.",
    "RedditClusteringP2P": _TOPIC.format("Reddit", "titles and posts"),
    "SciDocsRR": "Given a title of a scientific paper, retrieve the relevant papers.",
    "SprintDuplicateQuestions": "Retrieve duplicate questions from Sprint forum.",
    "StackExchangeClusteringP2P": _TOPIC.format("StackExchange", "given paragraphs"),
    "StackOverflowDupQuestions": "Retrieve duplicate questions from StackOverflow forum.",
    "TwitterSemEval2015": "Given a tweet, retrieve tweets that are semantically similar.",
    "TwitterURLCorpus": "Given a tweet, retrieve tweets that are semantically similar.",
}

TASKS = RETRIEVAL | SIMILARITY | CLASSIFICATION | CLUSTERING | OTHERS
# Of any other task, by its type; also from there, but for the two that it has no sentence for.
TYPES = {
    "STS": _SIMILAR,
    "Summarization": "Given a summary, retrieve semantically similar summaries.",
    "BitextMining": "Retrieve parallel sentences.",
    "Classification": "Given a text, classify it into main categories.",
    "MultilabelClassification": "Given a text, classify it into main categories.",
    "Clustering": "Identify categories based on text passages.",
    "Reranking": "Given a query, retrieve relevant texts.",
    "InstructionReranking": "Given a query, retrieve relevant texts.",
    "Retrieval": "Given a query, retrieve relevant texts.",
    "PairClassification": "Retrieve text that are semantically similar to the given text.",
}
SEPARATOR = " "


def prompt(name: str, task_type: str) -> str:
    """What goes before each text of a task, queries and documents alike; "" for no instruction."""
    instruction = TASKS.get(name) or TYPES.get(task_type, "")
    return instruction + SEPARATOR if instruction else ""
