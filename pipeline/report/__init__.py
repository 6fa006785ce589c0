"""The report: one HTML file made of what the stages left under ``work``; no network, no script.

    study       what a scored study left, and what it was made from
    wording     names and numbers for people
    sections    about scores: table, sets, distributions, training, thresholds, cost
    mixtures    about mixtures: routing, experts, classes, variants
    maps        ID and OOD features on a plane, before and after the experts
    gallery     thumbnails of the images that look least like what they are
    page        all of it through the templates, which format

What a study does not have (mixtures, several seeds, a group of OOD sets) is left out.
"""
